//! What the engine crate says, as faults.

use haulage_engine::{EngineError, EngineErrorKind, GatherError, Refusal};
use haulage_protocol::fault::{Fault, FaultCode};

use super::ENGINE;

/// A failed call to the engine. What a kind of failure means to one verb alone is that service's to say.
#[must_use]
pub fn engine(error: &EngineError) -> Fault {
    let fault = Fault::from_error(ENGINE, error);
    match error.kind() {
        EngineErrorKind::Unreachable | EngineErrorKind::Timeout => {
            fault.remedy("see whether dockerd runs on the host")
        }
        _ => fault,
    }
}

/// The engine or the machine could not be asked; `engine` tells of the former.
pub fn gather(error: &GatherError, engine: impl FnOnce(&EngineError) -> Fault) -> Fault {
    match error {
        GatherError::Engine(error) => engine(error),
        other => Fault::from_error(ENGINE, other),
    }
}

/// The first refusal is the fault; the others are told as its causes, so that all can be mended at once.
///
/// # Errors
/// When there is any refusal.
pub fn refused(refusals: &[Refusal]) -> Result<(), Fault> {
    let Some((first, others)) = refusals.split_first() else { return Ok(()) };
    let mut fault =
        Fault::new(FaultCode::new(first.code.as_str()), first.message.clone()).remedy(first.remedy.clone());
    fault.causes = others.iter().map(|other| format!("also refused: {other}")).collect();
    Err(fault)
}

#[cfg(test)]
mod tests {
    use super::*;
    use haulage_engine::RefusalCode;

    #[test]
    fn every_refusal_is_told_and_the_first_is_the_fault() {
        let refusal = |code, message: &str| Refusal {
            code,
            message: message.to_owned(),
            remedy: format!("mend {message}"),
        };
        assert!(refused(&[]).is_ok());
        let both = [refusal(RefusalCode::Tty, "terminal"), refusal(RefusalCode::Memory, "room")];
        let fault = refused(&both).unwrap_err();
        assert_eq!((fault.code.as_str(), fault.remedy.as_deref()), ("tty", Some("mend terminal")));
        assert_eq!(fault.causes, ["also refused: memory: room (mend room)"]);
    }

    #[test]
    fn an_engine_that_is_away_comes_with_a_remedy() {
        let error = |kind| EngineError::new(kind, "look", "no");
        assert!(engine(&error(EngineErrorKind::Unreachable)).remedy.is_some());
        let gathered = gather(&error(EngineErrorKind::Server).into(), engine);
        assert_eq!((gathered.code, gathered.remedy), (ENGINE, None));
    }
}
