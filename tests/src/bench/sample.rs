//! One run, and all runs of a contender.

use crate::bench::about::About;
use crate::bench::cell::{Cell, Contender, Engine};
use crate::bench::engine::Moved;
use crate::bench::stats::{Summary, figure, summary};
use crate::bench::usage::Usage;
use crate::bench::wire::Wire;
use serde::Serialize;

/// What one run gave. Times are in milliseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Sample {
    /// The longest wait of the probe that keeps its connection; nothing where connections do not survive.
    pub gap_steady: Option<f64>,
    /// The longest wait of the probe that makes a new connection each time.
    pub gap_reconnecting: f64,
    /// The longest waits of both just before, without a move: what the machine itself does to a probe.
    pub gap_before: f64,
    /// What the engine says.
    #[serde(flatten)]
    pub moved: Moved,
    /// Bytes on the wire.
    pub wire: Wire,
    /// Answers to the load per second before the move, and during pre-copy.
    pub throughput: Option<(f64, f64)>,
    /// Answers per second in pre-copy after all memory had gone once.
    pub repeated: Option<f64>,
    /// What our services used, on the source and on the target; only where ours is the engine.
    pub source: Option<Usage>,
    /// See `source`.
    pub target: Option<Usage>,
}

impl Sample {
    /// The gap that users feel: that of the connection which survives, or, where none does, of a new one.
    #[must_use]
    pub fn gap(&self) -> f64 {
        self.gap_steady.unwrap_or(self.gap_reconnecting)
    }

    /// Bytes on the wire by bytes of pages that existed and were not zeros.
    #[must_use]
    pub fn amplification(&self) -> Option<f64> {
        let pages = self.moved.pages.filter(|pages| *pages > 0)?;
        Some(figure(self.wire.hosts) / figure(pages * 4096))
    }

    /// The share of the workload's throughput that pre-copy takes.
    #[must_use]
    pub fn tax(&self) -> Option<f64> {
        let (before, during) = self.throughput?;
        (before > 0.0).then_some(1.0 - during / before)
    }

    /// The same after all memory has gone once: what tracking and repeated rounds take, without the link that is full.
    #[must_use]
    pub fn repeated_tax(&self) -> Option<f64> {
        let (before, _) = self.throughput?;
        self.repeated.filter(|_| before > 0.0).map(|during| 1.0 - during / before)
    }
}

/// All runs of one contender in one cell.
#[derive(Debug, Clone, Serialize)]
pub struct Runs {
    /// Who, and how many runs were wanted.
    #[serde(flatten)]
    pub contender: Contender,
    /// The first one, which does not count.
    pub discarded: Option<Sample>,
    /// Those that count.
    pub samples: Vec<Sample>,
    /// What failed, and why; the first run may be among them.
    pub failures: Vec<String>,
    /// Why it was not run at all, if so.
    pub skipped: Option<String>,
}

impl Runs {
    /// Nothing yet.
    #[must_use]
    pub const fn new(contender: Contender) -> Self {
        Self { contender, discarded: None, samples: Vec::new(), failures: Vec::new(), skipped: None }
    }

    /// Runs that were tried.
    #[must_use]
    pub fn tried(&self) -> usize {
        self.samples.len() + self.failures.len() + usize::from(self.discarded.is_some())
    }

    /// A figure over the counted runs.
    #[must_use]
    pub fn of(&self, figure: impl Fn(&Sample) -> Option<f64>) -> Option<Summary> {
        summary(self.samples.iter().filter_map(figure))
    }

    /// The gap over the counted runs.
    #[must_use]
    pub fn gap(&self) -> Option<Summary> {
        self.of(|sample| Some(sample.gap()))
    }
}

/// A cell with what came of it.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// What was to be measured.
    #[serde(flatten)]
    pub cell: Cell,
    /// By contender.
    pub runs: Vec<Runs>,
    /// How long the cell took, in seconds.
    pub seconds: f64,
    /// The clairvoyant bound D*, in milliseconds, where the workload's writes are known.
    pub bound: Option<f64>,
}

impl Outcome {
    /// The runs of one contender.
    #[must_use]
    pub fn of(&self, engine: Engine) -> Option<&Runs> {
        self.runs.iter().find(|runs| runs.contender.engine == engine)
    }
}

/// A whole run of the benchmark.
#[derive(Debug, Clone, Serialize)]
pub struct Results {
    /// What it ran on and with.
    pub about: Option<About>,
    /// The cells, in the order of the plan.
    pub cells: Vec<Outcome>,
    /// Cells that no time was left for.
    pub not_run: Vec<String>,
    /// How fast `process_vm_readv` reads on one core, in bytes per second.
    pub vm_readv: Option<f64>,
}

impl Results {
    /// A cell, by name, if it was run.
    #[must_use]
    pub fn cell(&self, name: &str) -> Option<&Outcome> {
        self.cells.iter().find(|outcome| outcome.cell.name == name)
    }

    /// A contender's runs in a cell, if it was run.
    #[must_use]
    pub fn runs(&self, name: &str, engine: Engine) -> Option<&Runs> {
        self.cell(name)?.of(engine)
    }
}
