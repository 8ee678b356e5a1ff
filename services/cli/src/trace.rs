//! `--trace FILE`: what ran when, in a file.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;

use haulage_migration::{Migration, trace};
use haulage_protocol::fault::{Fault, FaultCode};

use crate::output::{Failure, now};

/// The file cannot be made.
const TRACE: FaultCode = FaultCode::known("trace_file");

/// A file that a trace will be in.
pub(crate) struct TraceFile {
    path: PathBuf,
    file: File,
}

impl TraceFile {
    /// Makes it, empty.
    pub(crate) fn create(path: PathBuf) -> Result<Self, Failure> {
        match File::create(&path) {
            Ok(file) => Ok(Self { path, file }),
            Err(error) => {
                let message = format!("cannot write a trace to {}", path.display());
                Err(Fault::new(TRACE, message)
                    .because(&error)
                    .remedy("name another file with --trace")
                    .into())
            }
        }
    }

    /// Writes the trace of a migration.
    pub(crate) fn write(self, record: &Migration) -> Result<(), Failure> {
        let Self { path, file } = self;
        let mut out = BufWriter::new(file);
        let events = trace::trace(record, now());
        let written = serde_json::to_writer(&mut out, &events).map_err(std::io::Error::from);
        written.and_then(|()| out.flush()).map_err(|source| Failure::Trace { path, source })
    }
}
