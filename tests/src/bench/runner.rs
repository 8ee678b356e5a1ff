//! Runs the cells of a plan within a budget of time.

use crate::bench::cell::{Cell, Contender, Engine, Link};
use crate::bench::engine::{self, Capabilities, Subject};
use crate::bench::load::Load;
use crate::bench::probe::{Connection, Probe};
use crate::bench::sample::{Outcome, Runs, Sample};
use crate::bench::usage::Processes;
use crate::bench::wire::Counters;
use crate::bench::{bound, link, redis};
use crate::fleet::Fleet;
use crate::wait;
use anyhow::{Context, Result, ensure};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// The longest that one move may take.
const MOVE: Duration = Duration::from_secs(180);

/// How long load and probes run before a move, and what is measured of them then.
const BEFORE: Duration = Duration::from_millis(1500);

/// Answers that each probe must get after a move, and how long it has for them.
const AFTER: u64 = 200;
const BACK: Duration = Duration::from_secs(30);

/// How long a container may take from its start until it answers: it fills its memory.
const READY: Duration = Duration::from_secs(60);

/// What all runs need.
#[derive(Debug)]
pub struct Runner<'f> {
    fleet: &'f Fleet,
    counters: Counters,
    knows: Capabilities,
    /// No run is begun after this.
    deadline: Instant,
}

/// A contender in the cell that is being run.
struct Entry<'f> {
    runs: Runs,
    stand: Option<Stand<'f>>,
    /// Its longest run so far, with all that belongs to it.
    longest: Duration,
}

/// A contender's copy of the workload.
struct Stand<'f> {
    subject: Box<dyn Subject + 'f>,
    load: Load,
}

impl<'f> Runner<'f> {
    /// Makes ready for runs on a fleet whose services run.
    ///
    /// # Errors
    /// The packet filters or `haul` refused.
    pub fn new(fleet: &'f Fleet, deadline: Instant) -> Result<Self> {
        Ok(Self { fleet, counters: Counters::install(fleet)?, knows: Capabilities::ask(fleet)?, deadline })
    }

    /// Runs a cell; nothing when no time is left. What fails is part of the outcome.
    #[must_use]
    pub fn cell(&self, cell: &Cell) -> Option<Outcome> {
        let began = Instant::now();
        let end = self.deadline.min(began + cell.limit);
        if began >= self.deadline {
            return None;
        }
        let mut all: Vec<Entry<'f>> =
            cell.contenders.iter().map(|contender| self.entry(*contender)).collect();
        // In turn, so that whatever disturbs the machine disturbs all.
        let most = cell.contenders.iter().map(|contender| contender.runs).max().unwrap_or_default();
        for round in 0..=most {
            for (index, entry) in (0u8..).zip(&mut all) {
                // A run that is begun is not cut short, so one is begun only if there is time for the longest so far.
                let has_time = Instant::now() + entry.longest < end;
                if round > entry.runs.contender.runs || entry.runs.skipped.is_some() || !has_time {
                    continue;
                }
                self.turn(cell, index, entry);
            }
        }
        for Entry { runs, stand, .. } in &mut all {
            if let Some(Err(e)) = stand.as_mut().map(|stand| stand.subject.remove()) {
                runs.failures.push(format!("removal: {e:#}"));
            }
        }
        let runs = all.into_iter().map(|entry| entry.runs).collect();
        Some(Outcome {
            cell: cell.clone(),
            runs,
            seconds: began.elapsed().as_secs_f64(),
            bound: bound::of(cell),
        })
    }

    fn entry(&self, contender: Contender) -> Entry<'f> {
        let runs = Runs { skipped: self.why_not(contender.engine), ..Runs::new(contender) };
        Entry { runs, stand: None, longest: Duration::ZERO }
    }

    /// Why an engine cannot take part.
    fn why_not(&self, engine: Engine) -> Option<String> {
        match engine {
            Engine::Haul(Some(policy)) if !self.knows.knows_policy(policy) => {
                Some(format!("this build of haul has no `--policy {policy}`"))
            }
            _ => engine::why_not(engine),
        }
    }

    /// One run, with a new copy of the workload if there is none or the last one has failed.
    fn turn(&self, cell: &Cell, index: u8, entry: &mut Entry<'f>) {
        let Entry { runs, stand, longest } = entry;
        let began = Instant::now();
        let is_first = runs.tried() == 0;
        let engine = runs.contender.engine;
        eprint!("{} / {engine} / {}: ", cell.name, runs.tried());
        let done = self.run(cell, engine, index, stand);
        *longest = began.elapsed().max(*longest);
        eprint!("{:.1} s, ", began.elapsed().as_secs_f64());
        match done {
            Ok(sample) => {
                eprintln!("gap {:.0} ms, total {:.1} s", sample.gap(), sample.moved.total / 1e3);
                if is_first {
                    runs.discarded = Some(sample);
                } else {
                    runs.samples.push(sample);
                }
            }
            Err(e) => {
                eprintln!("failed: {e:#}");
                runs.failures.push(format!("{e:#}"));
                // Nothing is known of it now; the next run has a new one.
                if let Some(Err(e)) = stand.take().map(|mut stand| stand.subject.remove()) {
                    eprintln!("and is not removed: {e:#}");
                }
            }
        }
    }

    fn run(&self, cell: &Cell, engine: Engine, index: u8, stand: &mut Option<Stand<'f>>) -> Result<Sample> {
        if stand.is_none() {
            link::shape(self.fleet, Link::Unshaped)?;
            let subject = engine::start(self.fleet, cell, engine, index)?;
            let server = subject.server();
            // From here on a failure removes what was started.
            let stand = stand.insert(Stand { subject, load: Load::Writer { server, rate: 0 } });
            let what = format!("the first answer of the workload of {}", cell.name);
            wait::until(&what, READY, || Ok(answers(server).then_some(())))?;
            stand.load = Load::prepare(cell, server)?;
        }
        let stand = stand.as_mut().context("no workload")?;
        stand.subject.prepare().context("prepare the target")?;
        link::shape(self.fleet, cell.link)?;
        let sample = self.measure(engine, stand)?;
        link::shape(self.fleet, Link::Unshaped)?;
        let bad = stand.load.verify().context("verify")?;
        ensure!(bad == 0, "{bad} pages or values are not as they should be");
        Ok(sample)
    }

    fn measure(&self, engine: Engine, stand: &mut Stand<'f>) -> Result<Sample> {
        let Stand { subject, load } = stand;
        let server = subject.server();
        load.begin()?;
        let mut probes = Some(Probes::start(server)?);
        let began = redis::now_micros();
        // Not to wait for something: what happens in this time is measured.
        std::thread::sleep(BEFORE);
        let before = (began, redis::now_micros());
        let gap_before = probes.as_ref().map(Probes::longest).unwrap_or_default();
        let mut seen = None;
        if !subject.keeps_connections() {
            seen = Some(load.end()?);
            probes.take().map_or(Ok(()), Probes::stop)?;
        }

        let (from, to) = (subject.host(), 1 - subject.host());
        let ours = matches!(engine, Engine::Haul(_));
        let usage = |host| ours.then(|| Processes::begin(self.fleet, host)).transpose();
        let (source, target) = (usage(from)?, usage(to)?);
        let wire = self.counters.read()?;
        if let Some(probes) = &probes {
            probes.mark();
        }
        let asked = Instant::now();
        let moved = subject.go(MOVE)?;
        let gaps = match probes.take() {
            Some(probes) => probes.finish()?,
            None => Gaps { steady: None, reconnecting: first_answer(server, asked)? },
        };
        let end = |usage: Option<Processes>| usage.map(|processes| processes.end()).transpose();
        let (wire, source, target) = (self.counters.read()?.since(wire), end(source)?, end(target)?);
        let (timeline, error) = seen.map_or_else(|| load.end(), Ok)?;
        ensure!(error.is_none(), "the load has failed: {}", error.unwrap_or_default());
        let during = moved.pre_copy.and_then(|(from, to)| timeline.rate(from, to));
        let repeated = moved.repeated.and_then(|(from, to)| timeline.rate(from, to));
        Ok(Sample {
            gap_steady: gaps.steady.map(ms),
            gap_reconnecting: ms(gaps.reconnecting),
            gap_before: ms(gap_before),
            moved,
            wire,
            throughput: timeline.rate(before.0, before.1).zip(during),
            repeated,
            source,
            target,
        })
    }
}

/// Both probes.
struct Probes {
    steady: Probe,
    reconnecting: Probe,
}

struct Gaps {
    steady: Option<Duration>,
    reconnecting: Duration,
}

impl Probes {
    fn start(server: SocketAddr) -> Result<Self> {
        Ok(Self { steady: Probe::steady(server)?, reconnecting: Probe::reconnecting(server)? })
    }

    fn mark(&self) {
        self.steady.mark();
        self.reconnecting.mark();
    }

    fn longest(&self) -> Duration {
        self.steady.seen().longest.max(self.reconnecting.seen().longest)
    }

    fn stop(self) -> Result<()> {
        self.steady.stop()?;
        self.reconnecting.stop()
    }

    /// Waits until both have got answers after the move, and gives their longest waits since the mark.
    fn finish(self) -> Result<Gaps> {
        self.steady.progress(AFTER, BACK).context("the connection that was kept")?;
        self.reconnecting.progress(AFTER, BACK).context("new connections")?;
        let (steady, reconnecting) = (self.steady.seen(), self.reconnecting.seen());
        ensure!(steady.error.is_none(), "the connection was lost: {}", steady.error.unwrap_or_default());
        self.stop()?;
        Ok(Gaps { steady: Some(steady.longest), reconnecting: reconnecting.longest })
    }
}

/// Waits for the first answer to a new connection, and gives the time since `asked`.
fn first_answer(server: SocketAddr, asked: Instant) -> Result<Duration> {
    wait::until("the first answer after the move", BACK, || Ok(answers(server).then(|| asked.elapsed())))
}

fn answers(server: SocketAddr) -> bool {
    const TRY: Duration = Duration::from_millis(200);
    let answer = Connection::open(server, TRY, TRY).and_then(|mut connection| connection.ask("PING"));
    answer.is_ok_and(|answer| answer == "+PONG")
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
