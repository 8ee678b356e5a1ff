//! Plots: the downtime's parts, bytes by policy, the gap against the size of memory.

use crate::bench::cell::{Engine, Workload};
use crate::bench::sample::{Outcome, Results, Runs};
use crate::bench::stats::{figure, summary};
use anyhow::{Result, anyhow};
use plotters::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;

const SIZE: (u32, u32) = (1080, 540);

/// Parts of the downtime that run at the same time: the longest of them counts.
const PARALLEL: [&str; 3] = ["dump", "last_round", "files"];

/// Draws all of them into a directory.
///
/// # Errors
/// A file could not be written.
pub fn all(results: &Results, directory: &Path) -> Result<()> {
    let split: Vec<Bar> = contenders(results).filter_map(|(outcome, runs)| downtime(outcome, runs)).collect();
    bars(&directory.join("downtime.svg"), "Downtime by its parts, median", "ms", &split)?;
    bars(&directory.join("bytes.svg"), "Bytes on the wire by policy, median", "MB", &bytes(results))?;
    gap_by_size(&directory.join("gap-by-size.svg"), results)
}

fn contenders(results: &Results) -> impl Iterator<Item = (&Outcome, &Runs)> {
    results.cells.iter().flat_map(|outcome| outcome.runs.iter().map(move |runs| (outcome, runs)))
}

/// A bar: its name, and its segments from the bottom up.
#[derive(Debug)]
struct Bar {
    name: String,
    segments: Vec<(String, f64)>,
}

impl Bar {
    fn height(&self) -> f64 {
        self.segments.iter().map(|(_, height)| height).sum()
    }
}

/// The parts of our downtime. What none of them accounts for is `other`.
fn downtime(outcome: &Outcome, runs: &Runs) -> Option<Bar> {
    let Engine::Haul(None) = runs.contender.engine else { return None };
    let total = runs.of(|sample| sample.moved.freeze)?.median;
    let mut parts: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (part, took) in runs.samples.iter().flat_map(|sample| &sample.moved.split) {
        parts.entry(part).or_default().push(*took);
    }
    let medians = parts.into_iter().filter_map(|(part, all)| Some((part, summary(all)?.median)));
    let (parallel, rest): (Vec<_>, Vec<_>) = medians.partition(|(part, _)| PARALLEL.contains(part));
    let longest = parallel.iter().map(|(_, took)| *took).fold(0.0, f64::max);
    let mut segments: Vec<(String, f64)> =
        rest.into_iter().map(|(part, took)| (part.to_owned(), took)).collect();
    segments.push((PARALLEL.join(" | "), longest));
    let known: f64 = segments.iter().map(|(_, took)| took).sum();
    segments.push(("other".to_owned(), (total - known).max(0.0)));
    Some(Bar { name: outcome.cell.name.to_owned(), segments })
}

fn bytes(results: &Results) -> Vec<Bar> {
    let is_policy = |runs: &&Runs| matches!(runs.contender.engine, Engine::Haul(Some(_)));
    let compared = results.cells.iter().filter(|outcome| outcome.runs.iter().any(|runs| is_policy(&runs)));
    let compared = compared.flat_map(|outcome| outcome.runs.iter().map(move |runs| (outcome, runs)));
    compared
        .filter_map(|(outcome, runs)| {
            let bytes = runs.of(|sample| Some(figure(sample.wire.hosts)))?.median;
            let name = format!("{} {}", outcome.cell.name, runs.contender.engine);
            Some(Bar { name, segments: vec![(runs.contender.engine.to_string(), bytes / 1e6)] })
        })
        .collect()
}

fn color(index: usize) -> RGBColor {
    const COLORS: [RGBColor; 8] = [
        RGBColor(68, 119, 170),
        RGBColor(238, 102, 119),
        RGBColor(34, 136, 51),
        RGBColor(204, 187, 68),
        RGBColor(102, 204, 238),
        RGBColor(170, 51, 119),
        RGBColor(120, 120, 120),
        RGBColor(200, 200, 200),
    ];
    COLORS.get(index % COLORS.len()).copied().unwrap_or(BLACK)
}

/// Stacked bars, lying, one below the other.
fn bars(file: &Path, title: &str, unit: &str, all: &[Bar]) -> Result<()> {
    let highest = all.iter().map(Bar::height).fold(0.0, f64::max);
    if highest <= 0.0 {
        return Ok(());
    }
    let mut kinds: Vec<&str> = Vec::new();
    for (kind, _) in all.iter().flat_map(|bar| &bar.segments) {
        if !kinds.contains(&kind.as_str()) {
            kinds.push(kind);
        }
    }
    let area = SVGBackend::new(file, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(drawing)?;
    // The first bar is at the top, where the axis ends.
    let all: Vec<&Bar> = all.iter().rev().collect();
    let name = |row: &SegmentValue<usize>| match row {
        SegmentValue::CenterOf(row) => {
            all.get(*row).map(|bar| format!("{}: {:.0}", bar.name, bar.height())).unwrap_or_default()
        }
        _ => String::new(),
    };
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(210)
        // The legend is to the right of the longest bar.
        .build_cartesian_2d(0.0..highest * 1.35, (0..all.len() - 1).into_segmented())
        .map_err(drawing)?;
    let mut mesh = chart.configure_mesh();
    mesh.disable_y_mesh()
        .y_labels(all.len())
        .y_label_formatter(&name)
        .x_desc(unit)
        .draw()
        .map_err(drawing)?;
    for (kind_index, kind) in kinds.iter().enumerate() {
        let style = color(kind_index).filled();
        let mut boxes = Vec::new();
        for (row, bar) in all.iter().enumerate() {
            let before = bar.segments.iter().take_while(|(other, _)| other != kind).map(|(_, height)| height);
            let before: f64 = before.sum();
            let Some((_, height)) = bar.segments.iter().find(|(other, _)| other == kind) else { continue };
            let (from, to) = (SegmentValue::Exact(row), SegmentValue::Exact(row + 1));
            let mut drawn = Rectangle::new([(before, from), (before + height, to)], style);
            drawn.set_margin(3, 3, 0, 0);
            boxes.push(drawn);
        }
        let series = chart.draw_series(boxes).map_err(drawing)?;
        let mark = move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], style);
        series.label((*kind).to_owned()).legend(mark);
    }
    chart
        .configure_series_labels()
        .background_style(WHITE)
        .border_style(BLACK)
        .position(SeriesLabelPosition::UpperRight)
        .draw()
        .map_err(drawing)?;
    area.present().map_err(drawing)
}

/// Lines over the size of memory, one for each engine: all idle cells of one link.
fn gap_by_size(file: &Path, results: &Results) -> Result<()> {
    let mut lines: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for (outcome, runs) in contenders(results).filter(|(outcome, _)| outcome.cell.name.starts_with("grow-")) {
        let (Workload::Writer(writer), Some(gap)) = (outcome.cell.workload, runs.gap()) else { continue };
        let line = lines.entry(runs.contender.engine.to_string()).or_default();
        line.push((figure(writer.mebibytes), gap.median));
    }
    let highest = lines.values().flatten().map(|(_, gap)| *gap).fold(0.0, f64::max);
    if highest <= 0.0 {
        return Ok(());
    }
    let area = SVGBackend::new(file, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(drawing)?;
    let mut chart = ChartBuilder::on(&area)
        .caption("Gap against the size of idle memory, 10 Gbit/s, median", ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d((32.0..8192.0).log_scale(), (10.0..highest * 2.0).log_scale())
        .map_err(drawing)?;
    chart.configure_mesh().max_light_lines(0).x_desc("MiB").y_desc("ms").draw().map_err(drawing)?;
    for (index, (engine, mut points)) in lines.into_iter().enumerate() {
        points.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        let style = color(index).stroke_width(2);
        let dots: Vec<_> = points.iter().map(|at| Circle::new(*at, 4, color(index).filled())).collect();
        let line = chart.draw_series(LineSeries::new(points, style)).map_err(drawing)?;
        line.label(engine).legend(move |(x, y)| PathElement::new([(x, y), (x + 15, y)], style));
        chart.draw_series(dots).map_err(drawing)?;
    }
    chart
        .configure_series_labels()
        .background_style(WHITE)
        .border_style(BLACK)
        .position(SeriesLabelPosition::UpperLeft)
        .draw()
        .map_err(drawing)?;
    area.present().map_err(drawing)
}

/// Its errors borrow what is drawn on.
fn drawing(error: impl std::error::Error) -> anyhow::Error {
    anyhow!("{error}")
}
