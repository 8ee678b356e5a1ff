//! CRIU's RPC messages: the fields that we use of `images/rpc.proto` (CRIU 4.1 to 4.2; the numbers are CRIU's ABI and
//! have never changed). Unknown fields of an answer are skipped, as protobuf wants.

use crate::wire;

/// `criu_req_type`: what is asked, and what is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Kind {
    /// An error before the request's type was understood.
    Empty = 0,
    /// Dump a process tree.
    Dump = 1,
    /// Restore one.
    Restore = 2,
    /// Can CRIU work on this kernel?
    Check = 3,
    /// CRIU reports a stage and waits for the answer.
    Notify = 6,
    /// Which version is it?
    Version = 10,
}

/// `criu_cg_mode`: what becomes of cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum CgroupMode {
    /// Leave them alone.
    Ignore = 0,
    /// Restore the properties of those that CRIU creates.
    Soft = 3,
}

/// `criu_network_lock_method`: how packets are kept away while the tree is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum NetworkLock {
    /// By iptables rules in the network namespace.
    Iptables = 1,
    /// By nftables rules.
    Nftables = 2,
    /// Not at all: the caller sees to it.
    Skip = 3,
}

/// `criu_opts`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Options {
    /// The images' directory, as a descriptor of the requesting process.
    #[prost(int32, required, tag = "1")]
    pub images_dir_fd: i32,
    /// The root of the tree, in CRIU's pid namespace.
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
    /// Go on after the dump.
    #[prost(bool, optional, tag = "3")]
    pub leave_running: Option<bool>,
    /// Unix sockets may lead out of the tree.
    #[prost(bool, optional, tag = "4")]
    pub ext_unix_sk: Option<bool>,
    /// Established TCP connections are dumped or restored.
    #[prost(bool, optional, tag = "5")]
    pub tcp_established: Option<bool>,
    /// The session and terminal may lie outside the tree.
    #[prost(bool, optional, tag = "7")]
    pub shell_job: Option<bool>,
    /// File locks are dumped or restored.
    #[prost(bool, optional, tag = "8")]
    pub file_locks: Option<bool>,
    /// 0 to 4.
    #[prost(int32, optional, tag = "9")]
    pub log_level: Option<i32>,
    /// A file name in the working directory.
    #[prost(string, optional, tag = "10")]
    pub log_file: Option<String>,
    /// Report stages and wait for answers.
    #[prost(bool, optional, tag = "12")]
    pub notify_scripts: Option<bool>,
    /// The tree's root file system, as the host sees it.
    #[prost(string, optional, tag = "13")]
    pub root: Option<String>,
    /// The working directory, as a descriptor of the requesting process.
    #[prost(int32, optional, tag = "17")]
    pub work_dir_fd: Option<i32>,
    /// Deleted files that are still linked elsewhere may get a temporary name.
    #[prost(bool, optional, tag = "18")]
    pub link_remap: Option<bool>,
    /// Restored processes become siblings of CRIU, that is our children.
    #[prost(bool, optional, tag = "26")]
    pub rst_sibling: Option<bool>,
    /// See [`CgroupMode`].
    #[prost(enumeration = "CgroupMode", optional, tag = "34")]
    pub manage_cgroups_mode: Option<i32>,
    /// The largest deleted file that goes into the images, in bytes.
    #[prost(uint32, optional, tag = "35")]
    pub ghost_limit: Option<u32>,
    /// Resources that the images only name: `mnt[KEY]:NAME`, `net[INODE]:NAME`.
    #[prost(string, repeated, tag = "37")]
    pub external: Vec<String>,
    /// Namespaces whose content is not dumped, as `CLONE_NEW…` bits.
    #[prost(uint32, optional, tag = "38")]
    pub empty_ns: Option<u32>,
    /// The freezer cgroup of the tree.
    #[prost(string, optional, tag = "44")]
    pub freeze_cgroup: Option<String>,
    /// The longest time to seize the tree, in seconds.
    #[prost(uint32, optional, tag = "45")]
    pub timeout: Option<u32>,
    /// Connections that a listening socket has not accepted yet are left out rather than refused.
    #[prost(bool, optional, tag = "46")]
    pub tcp_skip_in_flight: Option<bool>,
    /// See [`NetworkLock`].
    #[prost(enumeration = "NetworkLock", optional, tag = "64")]
    pub network_lock: Option<i32>,
}

/// `criu_req`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    /// What is asked.
    #[prost(enumeration = "Kind", required, tag = "1")]
    pub kind: i32,
    /// How.
    #[prost(message, optional, tag = "2")]
    pub options: Option<Options>,
    /// The answer to a notification.
    #[prost(bool, optional, tag = "3")]
    pub notify_success: Option<bool>,
    /// More requests will follow on this connection.
    #[prost(bool, optional, tag = "4")]
    pub keep_open: Option<bool>,
}

impl Request {
    /// Reads a request that somebody else has made.
    ///
    /// # Errors
    /// When it is none.
    pub fn decode_bytes(bytes: &[u8]) -> Result<Self, prost::DecodeError> {
        prost::Message::decode(bytes)
    }

    /// A request that somebody else has made, with another `log_level` (0 to 4): nothing else of it is changed, known to us
    /// or not. `None` when it is none with options.
    pub fn with_log_level(bytes: &[u8], level: u8) -> Option<Vec<u8>> {
        let mut changed = Vec::with_capacity(bytes.len() + 8);
        let mut found = false;
        for field in wire::fields(bytes)? {
            if field.number != OPTIONS {
                changed.extend_from_slice(field.whole);
                continue;
            }
            let rest = wire::fields(field.content)?.into_iter().filter(|option| option.number != LOG_LEVEL);
            let mut options: Vec<u8> = rest.flat_map(|option| option.whole.iter().copied()).collect();
            prost::encoding::int32::encode(LOG_LEVEL, &i32::from(level), &mut options);
            wire::append(&mut changed, OPTIONS, &options);
            found = true;
        }
        found.then_some(changed)
    }
}

/// The numbers of [`Request::options`] and of [`Options::log_level`].
const OPTIONS: u32 = 2;
const LOG_LEVEL: u32 = 9;

/// `criu_resp`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Response {
    /// What is answered or reported.
    #[prost(enumeration = "Kind", required, tag = "1")]
    pub kind: i32,
    /// Whether it was done.
    #[prost(bool, required, tag = "2")]
    pub success: bool,
    /// Of [`Kind::Restore`].
    #[prost(message, optional, tag = "4")]
    pub restore: Option<Restored>,
    /// Of [`Kind::Notify`].
    #[prost(message, optional, tag = "5")]
    pub notify: Option<Notify>,
    /// CRIU's error number, near to errno.
    #[prost(int32, optional, tag = "7")]
    pub errno: Option<i32>,
    /// The first error that CRIU logged.
    #[prost(string, optional, tag = "9")]
    pub error: Option<String>,
    /// Of [`Kind::Version`].
    #[prost(message, optional, tag = "10")]
    pub version: Option<VersionNumbers>,
}

impl Response {
    /// Reads an answer or a notification that is for somebody else.
    ///
    /// # Errors
    /// When it is none.
    pub fn decode_bytes(bytes: &[u8]) -> Result<Self, prost::DecodeError> {
        prost::Message::decode(bytes)
    }
}

/// `criu_restore_resp`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Restored {
    /// The root of the restored tree.
    #[prost(int32, required, tag = "1")]
    pub pid: i32,
}

/// `criu_notify`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Notify {
    /// The stage: `pre-dump`, `network-lock`, `post-dump`, …
    #[prost(string, optional, tag = "1")]
    pub stage: Option<String>,
    /// The root of the tree, for some stages of a restore.
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
}

/// `criu_version`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VersionNumbers {
    /// 4 of 4.1.1.
    #[prost(int32, required, tag = "1")]
    pub major: i32,
    /// 1 of 4.1.1.
    #[prost(int32, required, tag = "2")]
    pub minor: i32,
    /// The last 1 of 4.1.1.
    #[prost(int32, optional, tag = "4")]
    pub sublevel: Option<i32>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    #[test]
    fn the_wire_form_is_criu_s() {
        let request = Request {
            kind: Kind::Dump.into(),
            options: Some(Options { images_dir_fd: 7, pid: Some(300), ..Options::default() }),
            notify_success: None,
            keep_open: None,
        };
        // type = DUMP; opts (4 + 1 bytes): images_dir_fd = 7, pid = 300
        assert_eq!(request.encode_to_vec(), [0x08, 1, 0x12, 5, 0x08, 7, 0x10, 0xac, 0x02]);
    }

    #[test]
    fn a_log_level_changes_and_nothing_else() {
        let options = Options { images_dir_fd: 7, log_level: Some(4), pid: Some(300), ..Options::default() };
        let request = Request { kind: Kind::Restore.into(), options: Some(options), ..Request::default() };
        let mut bytes = request.encode_to_vec();
        // Field 15 = 3, which we do not know.
        bytes.extend([0x78, 3]);
        let changed = Request::with_log_level(&bytes, 2).unwrap();
        assert!(changed.ends_with(&[0x78, 3]));
        let mut expected = request;
        expected.options.as_mut().unwrap().log_level = Some(2);
        assert_eq!(Request::decode_bytes(&changed).unwrap(), expected);
        assert_eq!(Request::with_log_level(&[0x08, 2], 2), None, "a request without options");
        assert_eq!(Request::with_log_level(b"\xff", 2), None);
    }

    #[test]
    fn an_answer_with_unknown_fields_is_read() {
        // type = NOTIFY, success, notify { script = "a", field 9 = 1 }, field 15 = 3
        let bytes = [0x08, 6, 0x10, 1, 0x2a, 5, 0x0a, 1, b'a', 0x48, 1, 0x78, 3];
        let response = Response::decode(&bytes[..]).unwrap();
        assert_eq!(response.kind(), Kind::Notify);
        assert_eq!(response.notify.unwrap().stage.unwrap(), "a");
    }
}
