export DISTRO_NAME=debian
export DIB_RELEASE=${DIB_RELEASE:-trixie}
export DIB_INIT_SYSTEM=systemd
export EFI_BOOT_DIR="EFI/debian"
export DIB_KERNEL=${DIB_KERNEL:-cloud}
export DIB_DISTRIBUTION_MIRROR=${DIB_DISTRIBUTION_MIRROR:-http://deb.debian.org/debian}
export DIB_DEBIAN_SECURITY_MIRROR=${DIB_DEBIAN_SECURITY_MIRROR:-http://deb.debian.org/debian-security}
export DIB_DEBIAN_COMPONENTS=${DIB_DEBIAN_COMPONENTS:-main}
# The mirrors that the finished image uses, which need not be those it is built from.
export DIB_NODE_MIRROR=${DIB_NODE_MIRROR:-http://deb.debian.org/debian}
export DIB_NODE_SECURITY_MIRROR=${DIB_NODE_SECURITY_MIRROR:-http://deb.debian.org/debian-security}
# This element keeps downloaded packages itself (see README.rst).
export DIB_APT_LOCAL_CACHE=0
