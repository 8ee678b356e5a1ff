//! The link between the hosts: a token bucket on both ends of each host's cable.

use crate::bench::cell::Link;
use crate::fleet::Fleet;
use crate::process::run;
use anyhow::Result;

/// How much may go at once, at least: a few of the largest segments that the kernel hands over.
const LEAST_BURST: u64 = 256 * 1024;

/// Sets the rate of what each host sends and of what reaches it, containers with addresses of their own included.
///
/// # Errors
/// `tc` refused.
pub fn shape(fleet: &Fleet, link: Link) -> Result<()> {
    let queue = queue(link);
    let queue: Vec<&str> = queue.split(' ').collect();
    for (netns, device) in fleet.cable_ends() {
        run("tc", &[&["-n", &netns, "qdisc", "replace", "dev", &device, "root"], queue.as_slice()].concat())?;
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
