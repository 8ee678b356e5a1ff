//! Which page each write of the synthetic writer goes to, as `workloads/writer.c` computes it.

use crate::bench::cell::{Pattern, Writer};

/// After how many writes of each of its pages the hot set moves on.
const TURNS: u64 = 4;

/// The writes of one of the writer's processes.
#[derive(Debug, Clone, Copy)]
pub struct Schedule {
    process: u64,
    pages: u64,
    hot: u64,
    pattern: Pattern,
}

impl Schedule {
    /// The schedule of the process with this number.
    #[must_use]
    pub fn new(writer: &Writer, process: u32) -> Self {
        let pages = (writer.mebibytes << 8) / u64::from(writer.processes.max(1));
        let hot = (pages * writer.hot_permille / 1000).max(1);
        Self { process: u64::from(process), pages: pages.max(1), hot, pattern: writer.pattern }
    }

    /// The page of the process' memory that its write with this number goes to.
    #[must_use]
    pub fn page(&self, number: u64) -> u64 {
        let page = mix((self.process << 48).wrapping_add(number)) % self.hot;
        let base = match self.pattern {
            Pattern::Hot => 0,
            Pattern::Shift => number / (self.hot * TURNS) * self.hot,
        };
        (base + page) % self.pages
    }
}

/// splitmix64.
fn mix(number: u64) -> u64 {
    let x = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::cell::{Fill, Kind, Rate};
    use crate::bench::writer;
    use crate::process::finish;

    #[test]
    fn is_the_schedule_of_the_program() {
        const WRITES: u64 = 5000;
        let directory = std::env::temp_dir().join(format!("writer-{}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let program = directory.join("writer");
        let compiled = crate::dirtier::compile(writer::SOURCE, &program);
        let say = |writer: &Writer| {
            let mut command = std::process::Command::new(&program);
            finish(command.args(writer::command_line(writer).iter().skip(1)).arg(WRITES.to_string()))
        };
        let mut said = Vec::new();
        for pattern in [Pattern::Hot, Pattern::Shift] {
            let writer = Writer {
                mebibytes: 2,
                processes: 3,
                pattern,
                hot_permille: 100,
                fill: Fill::Random,
                kind: Kind::Private,
                rate: Rate::Idle,
            };
            let schedule = Schedule::new(&writer, 1);
            said.push((say(&writer), (0..WRITES).map(|n| schedule.page(n)).collect::<Vec<_>>()));
        }
        std::fs::remove_dir_all(&directory).unwrap();
        compiled.unwrap();
        for (program, ours) in said {
            let program: Vec<u64> = program.unwrap().lines().map(|line| line.parse().unwrap()).collect();
            assert_eq!(program, ours);
        }
    }
}
