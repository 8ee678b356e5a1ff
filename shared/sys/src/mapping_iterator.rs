//! A BPF program that the kernel runs for each mapping of a process (an iterator, `Documentation/bpf/bpf_iterators.rst`).
//!
//! ```text
//!  load once ─► link for one process ─► read: start, end, flags of each mapping (8 bytes each)
//! ```
//!
//! # References
//! `include/uapi/linux/bpf.h`, which is stable ABI.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use crate::Pid;
use crate::btf::Btf;

const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const ITER_CREATE: libc::c_int = 33;
const PROG_TYPE_TRACING: u32 = 26;
const TRACE_ITER: u32 = 28;
const SEQ_WRITE: i32 = 127;
/// The kernel's functions for programs are for those under this licence.
const LICENSE: &std::ffi::CStr = c"GPL";
const NAME: &[u8; 16] = b"haul_vm_flags\0\0\0";

/// What is told of a mapping: three numbers.
const RECORD: usize = 24;
/// More than the kernel gathers for one read, 32 KiB. Of shorter reads it keeps what does not fit, and then tells the
/// last mapping over and over again (seen on Linux 6.18).
const READ: usize = 64 << 10;
/// An instruction; `Documentation/bpf/standardization/instruction-set.rst`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u8,
    /// The destination in the lower half, the source in the upper one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: from << 4 | to, offset, immediate }
}

const fn load(to: u8, from: u8, offset: i16) -> Instruction {
    instruction(0x79, to, from, offset, 0)
}

const fn store(to: u8, offset: i16, from: u8) -> Instruction {
    instruction(0x7b, to, from, offset, 0)
}

/// `union bpf_attr` for [`PROG_LOAD`], up to the last field that is used.
#[repr(C)]
#[derive(Default)]
struct ProgramAttr {
    kind: u32,
    instructions: u32,
    first: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
    btf: u32,
    function_size: u32,
    functions: u64,
    function_count: u32,
    line_size: u32,
    lines: u64,
    line_count: u32,
    attach_btf_id: u32,
}

const _: () = assert!(size_of::<Instruction>() == 8);
const _: () = assert!(size_of::<LinkAttr>() == 32 && size_of::<LinkAbout>() == 16);
const _: () = assert!(size_of::<IteratorAttr>() == 8);
const _: () = assert!(size_of::<ProgramAttr>() == 112);
const _: () = assert!(std::mem::offset_of!(ProgramAttr, attach_type) == 68);

#[repr(C)]
struct LinkAttr {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    about: u64,
    about_length: u32,
    padding: u32,
}

/// `union bpf_iter_link_info`, of which only the task is said.
#[repr(C)]
#[derive(Default)]
struct LinkAbout {
    thread: u32,
    process: u32,
    pidfd: u32,
    rest: u32,
}

#[repr(C)]
struct IteratorAttr {
    link: u32,
    flags: u32,
}

/// The program, loaded.
#[derive(Debug)]
pub(crate) struct MappingIterator {
    program: OwnedFd,
}

impl MappingIterator {
    /// Loads it.
    ///
    /// # Errors
    /// Where the kernel (before 6.1, without type information or locked down) or a missing `CAP_BPF` or `CAP_PERFMON`
    /// does not allow it.
    pub(crate) fn load() -> io::Result<Self> {
        Ok(Self { program: load_program(&Btf::of_kernel()?)? })
    }

    /// Start, end (exclusive) and flags of every mapping of `pid`, ascending; none when there is no such process.
    ///
    /// # Errors
    /// `InvalidData` when they are not in order, as those of a process that runs may be.
    pub(crate) fn tell(&self, pid: Pid) -> io::Result<Vec<(u64, u64, u64)>> {
        let about = LinkAbout { thread: pid.as_raw_nonzero().get().unsigned_abs(), ..LinkAbout::default() };
        let link = LinkAttr {
            program: number(&self.program),
            target: 0,
            attach_type: TRACE_ITER,
            flags: 0,
            about: (&raw const about) as u64,
            about_length: size_of::<LinkAbout>() as u32,
            padding: 0,
        };
        // SAFETY: the structure for this, with the address and length of `about`, which outlives it.
        let link = unsafe { bpf(LINK_CREATE, &link)? };
        // SAFETY: the structure for this; it has no address in it.
        let iterator = unsafe { bpf(ITER_CREATE, &IteratorAttr { link: number(&link), flags: 0 })? };
        let mut told = File::from(iterator);
        let (mut buffer, mut all) = (vec![0; READ], Vec::new());
        loop {
            let read = told.read(&mut buffer)?;
            let (records, rest) = buffer.get(..read).unwrap_or_default().as_chunks::<RECORD>();
            if !rest.is_empty() {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            let told_so_far = all.len();
            for record in records {
                let (numbers, _) = record.as_chunks();
                let &[start, end, flags] = numbers else { return Err(ErrorKind::InvalidData.into()) };
                let [start, end, flags] = [start, end, flags].map(u64::from_ne_bytes);
                match all.last() {
                    // At its end the kernel begins anew where it had to wait, or where its buffer was full.
                    Some((_, before, _)) if start < *before && all.len() == told_so_far => return Ok(all),
                    Some((_, before, _)) if start < *before => return Err(ErrorKind::InvalidData.into()),
                    _ => all.push((start, end, flags)),
                }
            }
            if all.len() == told_so_far {
                return Ok(all);
            }
        }
    }
}

fn load_program(btf: &Btf) -> io::Result<OwnedFd> {
    let missing =
        |what: &str| io::Error::new(ErrorKind::NotFound, format!("the kernel does not tell of {what}"));
    let function = btf.function("bpf_iter_task_vma").ok_or_else(|| missing("its iterators"))?;
    let field = |name: &str| {
        let offset = btf.offset("vm_area_struct", name).and_then(|offset| i16::try_from(offset).ok());
        offset.ok_or_else(|| missing(name))
    };
    let (start, end, flags) = (field("vm_start")?, field("vm_end")?, field("vm_flags")?);
    // Called with the address of `struct bpf_iter__task_vma { meta, task, vma }` in register 1. Register 10 is the end
    // of the stack.
    let program = [
        load(7, 1, 16),
        // At the end there is no mapping: jump to the end of this.
        instruction(0x15, 7, 0, 12, 0),
        load(1, 1, 0),
        // `meta->seq`, where it writes to.
        load(1, 1, 0),
        load(2, 7, start),
        store(10, -24, 2),
        load(2, 7, end),
        store(10, -16, 2),
        load(2, 7, flags),
        store(10, -8, 2),
        instruction(0xbf, 2, 10, 0, 0),
        instruction(0x07, 2, 0, 0, -24),
        instruction(0xb7, 3, 0, 0, 24),
        instruction(0x85, 0, 0, 0, SEQ_WRITE),
        instruction(0xb7, 0, 0, 0, 0),
        instruction(0x95, 0, 0, 0, 0),
    ];
    let attr = ProgramAttr {
        kind: PROG_TYPE_TRACING,
        instructions: program.len() as u32,
        first: program.as_ptr() as u64,
        license: LICENSE.as_ptr() as u64,
        name: *NAME,
        attach_type: TRACE_ITER,
        attach_btf_id: function,
        ..ProgramAttr::default()
    };
    // SAFETY: the structure for this, with the addresses of a program of that length and of a licence, which outlive
    // it.
    unsafe { bpf(PROG_LOAD, &attr) }
}

fn number(fd: &OwnedFd) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

/// `bpf(2)`, for commands that return a descriptor.
///
/// # Safety
/// `attr` must be the structure of this command, and the addresses in it must be of as much memory as it says, which
/// the kernel reads.
unsafe fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<OwnedFd> {
    // SAFETY: as the caller promises.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, ptr::from_ref(attr), size_of::<T>()) };
    match libc::c_int::try_from(fd) {
        // SAFETY: the kernel has just given it to us, and nobody else knows it.
        Ok(fd @ 0..) => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
