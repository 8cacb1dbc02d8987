//! The planish command: arguments in, a recipe or a call out, something good to look at.
#![forbid(unsafe_code)]

#[macro_use]
mod show;
mod args;
mod commands;
mod exit;
mod ranks;

use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match args::Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version come as errors of clap's too, and are none.
            let code = if e.use_stderr() { exit::USAGE } else { 0 };
            if ranks::speaks() {
                let _ = e.print();
            }
            return ExitCode::from(code);
        }
    };
    let json = cli.common.json;
    if let Err(e) = commands::prepare(&cli) {
        show::error(&e, exit::USAGE, json);
        return ExitCode::from(exit::USAGE);
    }
    ExitCode::from(tensor::threads::run(|| ranks::end(commands::run(cli), json)))
}
