//! The link between the hosts: a token bucket on both ends of each host's cable.

use crate::bench::cell::Link;
use crate::host::Host;
use crate::process::run;
use anyhow::Result;

/// How much may go at once, at least: a few of the largest segments that the kernel hands over.
const LEAST_BURST: u64 = 256 * 1024;

/// Sets the rate of what each host sends and of what reaches it, containers with addresses of their own included.
///
/// # Errors
/// `tc` refused.
pub fn shape(hosts: &[Host], link: Link) -> Result<()> {
    for host in hosts {
        // The end in the host's namespace limits what it sends, the bridge's end what it receives.
        let inner: [&str; 4] = ["-n", host.netns(), "qdisc", "replace"];
        let outer: [&str; 2] = ["qdisc", "replace"];
        for (command, device) in [(inner.as_slice(), "eth0"), (outer.as_slice(), host.netns())] {
            let queue = queue(link);
            let queue: Vec<&str> = queue.split(' ').collect();
            let target = ["dev", device, "root"];
            run("tc", &[command, &target, &queue].concat())?;
        }
    }
    Ok(())
}

fn queue(link: Link) -> String {
    match link {
        // A millisecond's worth, and a queue of 20 ms: as a switch with deep buffers.
        Link::Mbit(mbit) => {
            let burst = (u64::from(mbit) * 125).max(LEAST_BURST);
            format!("tbf rate {mbit}mbit burst {burst}b latency 20ms")
        }
        Link::Unshaped => "pfifo limit 1000".to_owned(),
    }
}
