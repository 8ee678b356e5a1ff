//! What a machine is, as far as a running process depends on it.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::facts::{CgroupVersion, EngineInfo};

/// Flags of /proc/cpuinfo that describe the kernel, the hypervisor or mitigations rather than instructions: no
/// program can depend on them, and they differ between equal CPUs.
const NOT_INSTRUCTIONS: &[&str] = &[
    "acc_power",
    "amd_lbr_v2",
    "amd_ppin",
    "aperfmperf",
    "apic",
    "arat",
    "arch_capabilities",
    "arch_lbr",
    "arch_perfmon",
    "art",
    "avic",
    "bts",
    "bus_lock_detect",
    "cat_l2",
    "cat_l3",
    "cdp_l2",
    "cdp_l3",
    "constant_tsc",
    "cpb",
    "cpuid",
    "cpuid_fault",
    "cqm",
    "cqm_llc",
    "cqm_mbm_local",
    "cqm_mbm_total",
    "cqm_occup_llc",
    "dca",
    "decodeassists",
    "de",
    "ds_cpl",
    "dtes64",
    "dtherm",
    "dts",
    "epb",
    "ept",
    "ept_ad",
    "est",
    "extapic",
    "extd_apicid",
    "flexpriority",
    "flush_l1d",
    "flushbyasid",
    "hw_pstate",
    "hwp",
    "hwp_act_window",
    "hwp_epp",
    "hwp_notify",
    "hwp_pkg_req",
    "hypervisor",
    "ibpb",
    "ibpb_exit_to_user",
    "ibrs",
    "ibrs_enhanced",
    "ibs",
    "ida",
    "intel_ppin",
    "intel_pt",
    "invpcid_single",
    "irperf",
    "lbrv",
    "mba",
    "mca",
    "mce",
    "md_clear",
    "monitor",
    "mtrr",
    "nonstop_tsc",
    "nopl",
    "npt",
    "nrip_save",
    "osvw",
    "pausefilter",
    "pbe",
    "pcid",
    "pconfig",
    "pdcm",
    "pebs",
    "perfctr_core",
    "perfctr_llc",
    "perfctr_nb",
    "perfmon_v2",
    "pfthreshold",
    "pge",
    "pln",
    "proc_feedback",
    "pse",
    "pse36",
    "pti",
    "pts",
    "rapl",
    "rdt_a",
    "rep_good",
    "sdbg",
    "sev",
    "sev_es",
    "skinit",
    "sme",
    "smx",
    "split_lock_detect",
    "ss",
    "ssbd",
    "stibp",
    "stibp_always_on",
    "svm",
    "svm_lock",
    "tm",
    "tm2",
    "topoext",
    "tpr_shadow",
    "tsc_adjust",
    "tsc_deadline_timer",
    "tsc_known_freq",
    "tsc_reliable",
    "tsc_scale",
    "v_spec_ctrl",
    "v_vmsave_vmload",
    "vgif",
    "virt_ssbd",
    "vmcb_clean",
    "vme",
    "vmmcall",
    "vmx",
    "vnmi",
    "vpid",
    "wbnoinvd",
    "wdt",
    "x2apic",
    "x2avic",
    "xtopology",
    "xtpr",
];

/// A machine and its engine, for comparison with another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Kernel release, as `uname -r`.
    pub kernel: String,
    /// Architecture, as `uname -m`.
    pub architecture: String,
    /// The first CPU's name.
    pub cpu_model: String,
    /// The CPU features that the kernel shows.
    pub cpu_flags: BTreeSet<String>,
    /// The engine's release.
    pub docker_version: String,
    /// The engine's storage driver.
    pub storage_driver: String,
    /// Which cgroup hierarchy containers get.
    pub cgroup_version: CgroupVersion,
}

/// A file of the kernel that could not be read or understood.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// It could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It lacks what every kernel writes there.
    #[error("{} has no {field}", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        field: &'static str,
    },
    /// The file system does not tell its free space.
    #[error("cannot ask for the free space at {}", path.display())]
    FreeSpace {
        /// A path on the file system.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl HostFacts {
    /// Reads this machine. Blocks shortly, on files of /proc only.
    ///
    /// # Errors
    /// When /proc/cpuinfo cannot be read.
    pub fn gather(engine: &EngineInfo) -> Result<Self, HostError> {
        let cpuinfo = read(Path::new("/proc/cpuinfo"))?;
        let uname = rustix::system::uname();
        Ok(Self {
            kernel: uname.release().to_string_lossy().into_owned(),
            architecture: uname.machine().to_string_lossy().into_owned(),
            cpu_model: cpu_field(&cpuinfo, "model name").unwrap_or_default().to_owned(),
            // arm64 calls them "Features".
            cpu_flags: cpu_field(&cpuinfo, "flags")
                .or_else(|| cpu_field(&cpuinfo, "Features"))
                .unwrap_or_default()
                .split_whitespace()
                .map(str::to_owned)
                .collect(),
            docker_version: engine.server_version.clone(),
            storage_driver: engine.storage_driver.clone(),
            cgroup_version: engine.cgroup_version,
        })
    }

    /// The CPU features that programs here may be using and `target` lacks, sorted.
    pub fn cpu_missing(&self, target: &Self) -> Vec<String> {
        self.cpu_flags
            .difference(&target.cpu_flags)
            .filter(|flag| !NOT_INSTRUCTIONS.contains(&flag.as_str()))
            .cloned()
            .collect()
    }

    /// The first two numbers of the kernel's release, by which its interface to programs is known.
    pub fn kernel_series(&self) -> (u32, u32) {
        let mut numbers = self.kernel.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
    }
}

/// Bytes of memory that programs can have without swapping (`MemAvailable`).
///
/// # Errors
/// When /proc/meminfo cannot be read or does not say.
pub fn memory_available() -> Result<u64, HostError> {
    let path = Path::new("/proc/meminfo");
    let text = read(path)?;
    text.lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .and_then(|kib| kib.checked_mul(1024))
        .ok_or_else(|| HostError::Missing { path: path.to_owned(), field: "MemAvailable" })
}

/// Bytes that root may still write on the file system of `path`.
///
/// # Errors
/// When the path does not exist or the file system does not answer.
pub fn disk_available(path: &Path) -> Result<u64, HostError> {
    let stat = rustix::fs::statvfs(path)
        .map_err(|error| HostError::FreeSpace { path: path.to_owned(), source: error.into() })?;
    Ok(stat.f_bfree.saturating_mul(stat.f_frsize))
}

fn read(path: &Path) -> Result<String, HostError> {
    std::fs::read_to_string(path).map_err(|source| HostError::Read { path: path.to_owned(), source })
}

fn cpu_field<'a>(cpuinfo: &'a str, key: &str) -> Option<&'a str> {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find_map(|(name, value)| (name.trim() == key).then(|| value.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(kernel: &str, flags: &[&str]) -> HostFacts {
        HostFacts {
            kernel: kernel.into(),
            architecture: "x86_64".into(),
            cpu_model: String::new(),
            cpu_flags: flags.iter().map(|f| (*f).to_owned()).collect(),
            docker_version: "20.10.24".into(),
            storage_driver: "overlay2".into(),
            cgroup_version: CgroupVersion::V1,
        }
    }

    #[test]
    fn only_instructions_count_as_missing() {
        let source = host("6.1.0", &["sse2", "avx2", "avx512f", "hypervisor", "constant_tsc"]);
        let target = host("6.1.0", &["sse2", "amx_tile"]);
        assert_eq!(source.cpu_missing(&target), ["avx2", "avx512f"]);
        assert!(source.cpu_missing(&source).is_empty());
    }

    #[test]
    fn kernels_compare_by_number() {
        assert_eq!(host("6.18.44-fc-v657", &[]).kernel_series(), (6, 18));
        assert!(host("6.9.1", &[]).kernel_series() < host("6.10.0-rc1", &[]).kernel_series());
        assert_eq!(host("7-custom", &[]).kernel_series(), (7, 0));
    }

    #[test]
    fn this_machine_can_be_read() {
        let engine = crate::samples::engine();
        let facts = HostFacts::gather(&engine).unwrap();
        assert!(facts.kernel_series() > (2, 6), "{facts:?}");
        assert!(!facts.cpu_flags.is_empty());
        assert!(memory_available().unwrap() > 1 << 20);
        assert!(disk_available(Path::new("/")).unwrap() > 0);
        assert!(disk_available(Path::new("/no/such/place")).is_err());
    }
}
