//! A program for the tests to move: it checks all its memory and a TCP connection over and over and says so in a file,
//! whose only line is `<ticks> <faults>`, padded so that its size never changes while it is open.
//!
//! It is the test binary itself, called with [`ARGS`], so that it is there whenever the test is.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What makes the test binary run the program.
pub(crate) const ARGS: &[&str] = &["--ignored", "--exact", "program::run", "--nocapture"];
/// The environment variable that names the status file.
pub(crate) const STATUS: &str = "STATUS_FILE";
/// Pages of the largest allocation.
pub(crate) const PAGES: usize = 256;

const WORDS_A_PAGE: usize = 512;

fn word(index: usize, generation: u64) -> u64 {
    (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31)
        ^ generation.wrapping_mul(0xff51_afd7_ed55_8ccd)
}

fn faults(words: &[u64], base: usize, generation: u64) -> u64 {
    words.iter().enumerate().filter(|(index, found)| **found != word(base + index, generation)).count() as u64
}

#[test]
#[ignore = "not a test but the program in the container"]
fn run() -> std::io::Result<()> {
    let status = File::create(std::env::var_os(STATUS).unwrap_or_default())?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut near = TcpStream::connect(listener.local_addr()?)?;
    let (mut far, _) = listener.accept()?;

    // A large allocation is a mapping of its own; small ones make up the heap.
    let mut generations = vec![0u64; PAGES];
    let mut large: Vec<u64> = (0..PAGES * WORDS_A_PAGE).map(|index| word(index, 0)).collect();
    let small: Vec<Box<[u64]>> =
        (0..200).map(|n| (0..50).map(|index| word(n + index, 1)).collect()).collect();
    let stack: [u64; WORDS_A_PAGE] = std::array::from_fn(|index| word(index, 2));
    let other = Arc::new(AtomicU64::new(0));
    let beat = Arc::clone(&other);
    std::thread::spawn(move || {
        loop {
            beat.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(1));
        }
    });

    let mut bad = 0;
    for tick in 1u64.. {
        for (page, (words, generation)) in large.chunks_mut(WORDS_A_PAGE).zip(&mut generations).enumerate() {
            bad += faults(words, page * WORDS_A_PAGE, *generation);
            if (page as u64 + tick).is_multiple_of(7) {
                *generation = tick;
                words
                    .iter_mut()
                    .enumerate()
                    .for_each(|(n, value)| *value = word(page * WORDS_A_PAGE + n, tick));
            }
        }
        bad += small.iter().enumerate().map(|(n, words)| faults(words, n, 1)).sum::<u64>();
        bad += faults(std::hint::black_box(&stack), 0, 2);
        let mut echo = [0; 8];
        near.write_all(&tick.to_le_bytes())?;
        far.read_exact(&mut echo)?;
        far.write_all(&echo)?;
        near.read_exact(&mut echo)?;
        bad += u64::from(u64::from_le_bytes(echo) != tick);
        let before = other.load(Ordering::Relaxed);
        while other.load(Ordering::Relaxed) == before {
            std::thread::sleep(Duration::from_millis(1));
        }
        status.write_all_at(format!("{:<63}\n", format!("{tick} {bad}")).as_bytes(), 0)?;
    }
    Ok(())
}
