//! Kernel structures and numbers that `libc` lacks, with their layouts and encodings asserted at compile time.
//!
//! # References
//! `include/uapi/linux/{userfaultfd,fs,ptrace,kcmp,rseq}.h` of Linux 6.7 and later; they are stable ABI.

use std::mem::size_of;

/// Bytes of a page. The tracker runs on x86-64 only, where this is fixed.
pub const PAGE_SIZE: u64 = 4096;
/// [`PAGE_SIZE`] as a length in memory.
pub const PAGE_BYTES: usize = 4096;
/// One past the highest address that a process gets without asking for 57-bit addresses (`TASK_SIZE`; the kernel keeps
/// the page below 2^47 free).
pub const ADDRESS_END: u64 = (1 << 47) - PAGE_SIZE;

const _: () =
    assert!(cfg!(all(target_os = "linux", target_arch = "x86_64")), "register layouts are x86-64's");
const _: () = assert!(PAGE_BYTES as u64 == PAGE_SIZE);

/// `_IOWR(kind, number, size)`.
const fn iowr(kind: u8, number: u8, size: usize) -> libc::Ioctl {
    ((3 << 30) | ((size as u64) << 16) | ((kind as u64) << 8) | number as u64) as libc::Ioctl
}

/// `_IOR(kind, number, size)`.
const fn ior(kind: u8, number: u8, size: usize) -> libc::Ioctl {
    ((2 << 30) | ((size as u64) << 16) | ((kind as u64) << 8) | number as u64) as libc::Ioctl
}

#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct UffdioApi {
    pub(crate) api: u64,
    pub(crate) features: u64,
    pub(crate) ioctls: u64,
}

#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct UffdioRange {
    pub(crate) start: u64,
    pub(crate) len: u64,
}

#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct UffdioRegister {
    pub(crate) range: UffdioRange,
    pub(crate) mode: u64,
    pub(crate) ioctls: u64,
}

#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct UffdioWriteProtect {
    pub(crate) range: UffdioRange,
    pub(crate) mode: u64,
}

#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct UffdioCopy {
    pub(crate) dst: u64,
    pub(crate) src: u64,
    pub(crate) len: u64,
    pub(crate) mode: u64,
    /// Bytes that were copied, or a negative errno.
    pub(crate) copy: i64,
}

#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct UffdioZeropage {
    pub(crate) range: UffdioRange,
    pub(crate) mode: u64,
    /// Bytes that were mapped, or a negative errno.
    pub(crate) zeropage: i64,
}

/// `struct uffd_msg`: an event and up to three numbers, whose meaning is the event's.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct UffdMsg {
    pub(crate) event: u8,
    pub(crate) reserved1: u8,
    pub(crate) reserved2: u16,
    pub(crate) reserved3: u32,
    pub(crate) arg: [u64; 3],
}

pub(crate) const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
pub(crate) const UFFD_EVENT_FORK: u8 = 0x13;
pub(crate) const UFFD_EVENT_REMAP: u8 = 0x14;
pub(crate) const UFFD_EVENT_REMOVE: u8 = 0x15;
pub(crate) const UFFD_EVENT_UNMAP: u8 = 0x16;

pub(crate) const UFFD_API: u64 = 0xAA;
pub(crate) const UFFD_USER_MODE_ONLY: u64 = 1;
pub(crate) const UFFD_FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
pub(crate) const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
pub(crate) const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
pub(crate) const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;

pub(crate) const UFFDIO_API: libc::Ioctl = iowr(0xAA, 0x3F, size_of::<UffdioApi>());
pub(crate) const UFFDIO_REGISTER: libc::Ioctl = iowr(0xAA, 0x00, size_of::<UffdioRegister>());
pub(crate) const UFFDIO_WAKE: libc::Ioctl = ior(0xAA, 0x02, size_of::<UffdioRange>());
pub(crate) const UFFDIO_COPY: libc::Ioctl = iowr(0xAA, 0x03, size_of::<UffdioCopy>());
pub(crate) const UFFDIO_ZEROPAGE: libc::Ioctl = iowr(0xAA, 0x04, size_of::<UffdioZeropage>());
pub(crate) const UFFDIO_WRITEPROTECT: libc::Ioctl = iowr(0xAA, 0x06, size_of::<UffdioWriteProtect>());

const _: () = assert!(size_of::<UffdioApi>() == 24);
const _: () = assert!(size_of::<UffdioRegister>() == 32);
const _: () = assert!(size_of::<UffdioWriteProtect>() == 24);
const _: () = assert!(UFFDIO_API == 0xC018_AA3F);
const _: () = assert!(UFFDIO_REGISTER == 0xC020_AA00);
const _: () = assert!(UFFDIO_WRITEPROTECT == 0xC018_AA06);
const _: () = assert!(size_of::<UffdMsg>() == 32);
const _: () = assert!(UFFDIO_WAKE == 0x8010_AA02);
const _: () = assert!(UFFDIO_COPY == 0xC028_AA03);
const _: () = assert!(UFFDIO_ZEROPAGE == 0xC020_AA04);

/// `struct page_region`: pages `start..end` (addresses) that have the same `categories`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RawPageRegion {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) categories: u64,
}

#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct PmScanArg {
    pub(crate) size: u64,
    pub(crate) flags: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) walk_end: u64,
    pub(crate) vec: u64,
    pub(crate) vec_len: u64,
    pub(crate) max_pages: u64,
    pub(crate) category_inverted: u64,
    pub(crate) category_mask: u64,
    pub(crate) category_anyof_mask: u64,
    pub(crate) return_mask: u64,
}

pub(crate) const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
pub(crate) const PAGEMAP_SCAN: libc::Ioctl = iowr(b'f', 16, size_of::<PmScanArg>());

const _: () = assert!(size_of::<RawPageRegion>() == 24);
const _: () = assert!(size_of::<PmScanArg>() == 96);
const _: () = assert!(PAGEMAP_SCAN == 0xC060_6610);

/// `struct ptrace_rseq_configuration`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct RseqConfiguration {
    pub(crate) rseq_abi_pointer: u64,
    pub(crate) rseq_abi_size: u32,
    pub(crate) signature: u32,
    pub(crate) flags: u32,
    pub(crate) pad: u32,
}

/// `struct f_owner_ex`.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct FileOwner {
    pub(crate) kind: i32,
    pub(crate) pid: i32,
}

pub(crate) const F_GETOWN_EX: libc::c_int = 16;
pub(crate) const F_GETSIG: libc::c_int = 11;

const _: () = assert!(size_of::<FileOwner>() == 8);

pub(crate) const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420F;
/// Offset of the `rseq_cs` pointer in `struct rseq`.
pub(crate) const RSEQ_CS_OFFSET: u64 = 8;
pub(crate) const KCMP_FILE: libc::c_int = 0;
pub(crate) const KCMP_VM: libc::c_int = 1;

const _: () = assert!(size_of::<RseqConfiguration>() == 24);
