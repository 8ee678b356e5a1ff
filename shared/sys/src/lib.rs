//! Every `unsafe` of the workspace: system calls that the standard library and `rustix` do not offer, each behind a
//! safe function.
//!
//! | module | what it does |
//! | --- | --- |
//! | [`inject`] | makes a userfaultfd in another process and takes it over |
//! | [`record_lock`] | locks of processes on ranges of files |
//! | [`take_locks`] | has processes take such locks, and attach segments, before they run |
//! | [`attach`] | a System V segment as a process is to attach it |
//! | [`standstill`] | stops every thread of several processes for a moment |
//! | [`uffd`] | registers memory for asynchronous write tracking |
//! | [`lazy`] | serves the missing pages of another process through its userfaultfd |
//! | [`pagemap`] | `PAGEMAP_SCAN`, and the plain entries of a pagemap |
//! | [`soft_dirty`] | soft-dirty marks, and which pages are the kernel's pages of zeros |
//! | [`vm_flags`] | the flags of another process's mappings |
//! | [`vm_read`] | reads another process's memory |
//! | [`pass_fd`] | descriptors over a Unix socket |
//! | [`pidfd`] | process descriptors; whether two processes share memory |
//! | [`freezer`] | freezes and thaws a cgroup, version 1 or 2 |
//! | [`netns`] | runs code in another process's network namespace |
//! | [`ipc`] | IPC namespaces and what is in them |
//! | [`mount_ns`] | starts a program in a mount namespace of its own |
//! | [`tmpfs`] | a tmpfs that is mounted nowhere until somebody takes it |
//! | [`packet`] | takes arriving packets, and puts them back |
//! | [`rcu`] | shortens waits of the kernel's while a container stands still |
//! | [`arp`] | announces an address on a network segment |
//! | [`process`] | facts about a process |
//!
//! x86-64 Linux only: injection knows the machine's registers and instructions.

mod abi;
pub mod arp;
pub mod attach;
mod btf;
mod error;
pub mod freezer;
pub mod inject;
pub mod ipc;
pub mod lazy;
mod mapping_iterator;
pub mod mount_ns;
pub mod netns;
pub mod packet;
pub mod pagemap;
pub mod pass_fd;
pub mod pidfd;
pub mod process;
mod ptrace;
pub mod rcu;
pub mod record_lock;
pub mod soft_dirty;
pub mod standstill;
pub mod take_locks;
mod thread_choice;
pub mod tmpfs;
pub mod uffd;
pub mod view;
pub mod vm_flags;
pub mod vm_read;
mod window;

pub use abi::{ADDRESS_END, PAGE_BYTES, PAGE_SIZE};
pub use error::CallError;
pub use rustix::io::Errno;
/// A process id in our own pid namespace.
pub use rustix::process::Pid;
