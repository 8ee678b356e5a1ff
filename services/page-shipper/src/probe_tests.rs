use super::*;
use haulage_protocol::id::HostId;
use haulage_protocol::secret::Token;
use haulage_service::bulk::Arrivals;
use haulage_service::config::{HostConfig, NatsConfig};
use proptest::prelude::*;

/// A measurement of a link of so many bytes a second, where each burst takes a little longer than its bytes.
fn over(rate: f64, delay: Duration) -> LinkMeasured {
    let mut probe = Probe::default();
    while let Some(burst) = probe.next() {
        probe.took(burst, delay + Duration::from_secs_f64(burst as f64 / rate));
    }
    probe.measured()
}

proptest! {
    #[test]
    fn a_measurement_is_bounded_and_finds_the_rate(rate in 1e6..20e9_f64, delay in 0..2000_u64) {
        let measured = over(rate, Duration::from_micros(delay));
        prop_assert!(measured.sent <= PROBE_BYTES);
        // Where even the first burst takes longer there is no other.
        let first = Duration::from_secs_f64(FIRST as f64 / rate) + Duration::from_micros(delay);
        prop_assert!(measured.took <= Micros::from_duration(LONGEST.max(first)));
        let found = measured.rate.0 as f64;
        prop_assert!(found <= rate * 1.001, "{found} of {rate}");
        // The delay of an answer counts for less the longer the bursts are.
        if rate > 20e6 && rate < 1e9 {
            prop_assert!(found >= rate * 0.9, "{found} of {rate}");
        }
    }
}

async fn sink(migration: &MigrationId, token: &Token) -> Arrivals {
    let config = HostConfig {
        nats: NatsConfig { nats: String::new() },
        host: "here".parse::<HostId>().unwrap(),
        state_dir: Default::default(),
        page_dir: Default::default(),
        docker: String::new(),
        bucket: String::new(),
        bulk_listen: ([127, 0, 0, 1], 0).into(),
        bulk_advertise: None,
    };
    let arrivals = Arrivals::bind(&config, CARGO).await.unwrap();
    arrivals.open(migration.clone(), token, Sink).unwrap();
    arrivals
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_is_measured_by_who_has_the_token_and_by_nobody_else() {
    let (migration, token) = (MigrationId::generate(), Token::generate());
    let arrivals = sink(&migration, &token).await;
    let address = arrivals.address().to_string();
    let stranger = MeasureLink { address: address.clone(), token: Token::generate() };
    assert_eq!(measure(migration.clone(), stranger).await.unwrap_err().code.as_str(), "wrong_token");
    let measured = measure(migration.clone(), MeasureLink { address, token: token.clone() }).await.unwrap();
    assert!(measured.rate > Size(0) && measured.sent >= Size(FIRST), "{measured:?}");
    arrivals.close(&migration).await;
    let gone = MeasureLink { address: arrivals.address().to_string(), token };
    assert_eq!(measure(migration, gone).await.unwrap_err().code.as_str(), "unknown_session");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sink_takes_no_more_than_it_should_and_nothing_else() {
    for (kind, frames) in [(PROBE, 65), (crate::wire::BATCH, 1)] {
        let (migration, token) = (MigrationId::generate(), Token::generate());
        let arrivals = sink(&migration, &token).await;
        let mut to =
            Departure::connect(&arrivals.address().to_string(), &migration, &token, CARGO).await.unwrap();
        for _ in 0..frames {
            // It may have been refused on the way.
            if to.connection.send(kind, noise()).await.is_err() {
                break;
            }
        }
        assert_eq!(to.answer(OK, "it").await.unwrap_err().code, code::MALFORMED);
    }
}

#[test]
fn noise_does_not_pack() {
    let noise = noise();
    assert_eq!(noise.len(), FRAME);
    let mut counts = [0_u32; 256];
    noise.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
    let even = (FRAME / 256) as u32;
    assert!(counts.iter().all(|count| count.abs_diff(even) < even / 8), "{counts:?}");
}
