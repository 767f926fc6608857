# The version has no default: an image is of the version that its manifest says.
export DIB_KUBERNETES_VERSION=${DIB_KUBERNETES_VERSION:-}
export DIB_KUBERNETES_PACKAGES=${DIB_KUBERNETES_PACKAGES:-https://pkgs.k8s.io/core:/stable:}
# Of the key that upstream signs its packages with: https://pkgs.k8s.io/core:/stable:/v1.35/deb/Release.key
export DIB_KUBERNETES_KEY=${DIB_KUBERNETES_KEY:-DE15B14486CD377B9E876E1A234654DA9A296436}
export DIB_KUBERNETES_IMAGES=${DIB_KUBERNETES_IMAGES-pause kube-proxy coredns}
export DIB_KUBERNETES_IMAGE_FOLDER=${DIB_KUBERNETES_IMAGE_FOLDER:-}
