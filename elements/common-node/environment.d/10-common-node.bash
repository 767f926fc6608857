# Which drivers the initramfs holds: "virtual" for the disks that clouds give to
# virtual machines, "all" for bare metal.
export DIB_INITRAMFS_DRIVERS=${DIB_INITRAMFS_DRIVERS:-virtual}
