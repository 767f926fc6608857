#!/bin/bash
# Builds Kubernetes from Debian 12's source package, in a root of that Debian: see kubernetes.py.
# Arguments: the version as upstream has it, and the folder (in this root) for what is built.

set -eu -o pipefail

version=$1
out=$2
export DEBIAN_FRONTEND=noninteractive HOME=/root

mkdir -p /build/src/k8s.io "${out}"
cd /build/src/k8s.io
# apt checks the source package's signature.
apt-get source --quiet=2 --download-only kubernetes
mkdir kubernetes
tar -xzf kubernetes_*.orig.tar.gz --strip-components=1 -C kubernetes
cd kubernetes

# The vendored one crashes with Go 1.18 and later, whose maps are iterated in another way.
rm -rf vendor/github.com/modern-go/reflect2
cp -rL /usr/share/gocode/src/github.com/modern-go/reflect2 vendor/github.com/modern-go/reflect2

major=${version%%.*}
minor=${version#*.}
cat > /build/version <<EOF
KUBE_GIT_COMMIT=''
KUBE_GIT_TREE_STATE='archive'
KUBE_GIT_VERSION='v${version}'
KUBE_GIT_MAJOR='${major}'
KUBE_GIT_MINOR='${minor%%.*}'
EOF
export GOPATH=/build GO111MODULE=off CGO_ENABLED=0 GOFLAGS=-buildvcs=false KUBE_GIT_VERSION_FILE=/build/version
export PATH=/usr/lib/go/bin:${PATH}
programs=(kubelet kubeadm kubectl kube-apiserver kube-controller-manager kube-scheduler kube-proxy)
make WHAT="${programs[*]/#/cmd/}"
for program in "${programs[@]}"; do
    cp "_output/local/bin/linux/amd64/${program}" "${out}/"
done
gcc -Os -Wall -static -DVERSION="v${version}" -o "${out}/pause" build/pause/linux/pause.c

# What the images hold beside them: programs with the libraries that they load.
layer() {
    local layer=$1 file
    shift
    for file; do
        install -D "$(readlink -f "${file}")" "${layer}${file}"
        { ldd "${file}" 2>/dev/null || true; } | { grep -o '/[^ ]*' || true; } | while read -r library; do
            install -D "$(readlink -f "${library}")" "${layer}${library}"
        done
    done
}
tools=(/usr/sbin/iptables /usr/sbin/iptables-save /usr/sbin/iptables-restore
       /usr/sbin/ip6tables /usr/sbin/ip6tables-save /usr/sbin/ip6tables-restore /usr/sbin/conntrack)
layer "${out}/proxy-root" "${tools[@]}" /usr/lib/x86_64-linux-gnu/xtables/*.so
layer "${out}/dns-root" /usr/sbin/dnsmasq /bin/busybox
