//! Writes the ids of each line of a text file, for comparing with other tokenizers: `token_ids DIR FILE`.

use formats::tokenizer::Tokenizer;
use std::{error::Error, fs, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, dir, file] = args.as_slice() else {
        return Err("usage: token_ids DIR FILE".into());
    };
    let tokenizer = Tokenizer::from_dir(Path::new(dir))?;
    for line in fs::read_to_string(file)?.split('\n') {
        let ids = tokenizer.encode(line, true)?;
        let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
        println!("{}", ids.join(" "));
    }
    Ok(())
}
