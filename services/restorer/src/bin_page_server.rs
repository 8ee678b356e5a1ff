//! `haul-page-server`: gives a restored container its memory while it runs. Started by `haul-restorer`, one for each
//! restore; it ends when the container owns all its memory.

use std::process::ExitCode;

fn main() -> ExitCode {
    haulage_restorer::page_server::main()
}
