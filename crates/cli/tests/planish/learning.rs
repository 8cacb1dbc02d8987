//! What teaches models.

use crate::{fails, json, kill_again_and_again, path, planish, sample};
use std::{fs, path::Path, time::Instant};

#[test]
fn a_student_learns_more_from_its_teacher_than_from_the_text_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let distil = |name: &str, share: &str| {
        let out = path(&dir, name);
        let words = ["distill", "--teacher", &folder, "--student-layers", "0,2", "--share", share, "--data", &text];
        let more = ["--steps", "40", "--batch", "4", "--context", "128", "--lr", "1e-3", "--out", &out];
        json(&[&words[..], &more[..]].concat())["validation_loss"].as_f64().unwrap()
    };
    let (taught, alone) = (distil("taught", "1"), distil("alone", "0"));
    println!("from the teacher {taught}, from the text {alone}");
    assert!(taught < alone);
    assert_eq!(json(&["inspect", &path(&dir, "taught")])["blocks"], 2);
    // A student goes on from what it is, by another divergence, and a quantized teacher will do.
    let small = path(&dir, "small");
    json(&["quantize", &folder, "--bits", "5", "--data", &text, "--out", &small]);
    for divergence in ["reverse", "jensen-shannon"] {
        let out = path(&dir, divergence);
        let words = ["distill", &path(&dir, "taught"), "--teacher", &small, "--divergence", divergence];
        let more = ["--data", &text, "--steps", "4", "--context", "128", "--lr", "1e-5", "--out", &out];
        let loss = json(&[&words[..], &more[..]].concat())["validation_loss"].as_f64().unwrap();
        assert!(loss < 1.01 * taught, "{divergence}: {loss}");
    }
    let wrong = |words: &[&str], says: &str| {
        let out = path(&dir, "wrong");
        fails(&[&["distill", "--teacher", &folder, "--data", &text, "--out", &out], words].concat(), 2, says);
    };
    wrong(&[], "--student-layers");
    wrong(&["--student-layers", "2,0"], "rising order");
    wrong(&["--student-layers", "0,3"], "from 0 to 2");
    wrong(&["--student-layers", "0", "--share", "2"], "--share");
    wrong(&["--student-layers", "0", "--temperature", "0"], "--temperature");
    wrong(&["--student-layers", "0", "--divergence", "kl"], "jensen-shannon");
}

#[test]
fn models_of_the_recipes_folder_are_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/models");
    for entry in fs::read_dir(folder).unwrap() {
        // What is missing is only the text.
        fails(&["train", &entry.unwrap().path().to_string_lossy(), "--out", "x"], 2, "--data FILE");
    }
}

/// Words of a short lesson on the sample.
fn lesson<'a>(folder: &'a str, text: &'a str, out: &'a str) -> Vec<&'a str> {
    let words =
        ["finetune", folder, "--data", text, "--steps", "24", "--batch", "4", "--context", "128", "--lr", "3e-4"];
    [&words[..], &["--checkpoint-every", "5", "--validate-every", "6", "--out", out]].concat()
}

#[test]
fn fine_tuning_learns_the_text_and_says_how_it_went() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, _) = sample(&dir);
    // Numbers are new to the model.
    let text = path(&dir, "numbers.txt");
    let count = |n: usize| (n..n + 40).map(|i| format!("{i} ")).collect::<String>();
    let documents: Vec<String> = (0..80).map(|n| count(n * 7)).collect();
    fs::write(&text, documents.join("\n<|endoftext|>\n")).unwrap();
    for precision in ["f32", "bf16"] {
        let out = path(&dir, precision);
        let done = json(&[&lesson(&folder, &text, &out)[..], &["--precision", precision]].concat());
        let number = |key: &str| done[key].as_f64().unwrap_or_else(|| panic!("{key} in {done}"));
        assert_eq!(number("steps"), 24.0);
        assert!(number("tokens") > 24.0 * 300.0 && number("tokens_per_second") > 0.0);
        assert!(number("share_of_peak") > 0.0 && number("peak_rss_bytes") > 1e6);
        assert!(number("validation_loss") < 0.7 * number("validation_loss_before"), "{done}");
        // What was written is what was measured.
        let measured = json(&["evaluate", &out, "--against", &folder, "--data", &text]);
        assert!(measured["against"]["perplexity_ratio"].as_f64().unwrap() < 0.5, "{measured}");
        assert!(json(&["verify", &out])["faults"].as_array().unwrap().is_empty());
        // The same job again is done already; another one does not write over it.
        assert_eq!(
            json(&[&lesson(&folder, &text, &out)[..], &["--precision", precision]].concat())["already_done"],
            true
        );
        fails(&[&lesson(&folder, &text, &out)[..], &["--seed", "9"]].concat(), 2, "--overwrite");
    }
}

#[test]
fn a_killed_lesson_goes_on_and_ends_in_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let commands = [
        (&["finetune", &folder][..], "model.safetensors"),
        (&["distill", "--teacher", &folder, "--student-layers", "0,2"], "model.safetensors"),
        (&["finetune", &folder, "--lora", "rank=4,dora", "--checkpoint-activations"], "adapter_model.safetensors"),
    ];
    for (i, (command, weights)) in commands.into_iter().enumerate() {
        let (whole, killed) = (path(&dir, &format!("{i}-whole")), path(&dir, &format!("{i}-killed")));
        let words = |out| [command, &lesson(&folder, &text, out)[2..]].concat();
        let begin = Instant::now();
        assert!(planish().args(words(&whole)).output().unwrap().status.success());
        let time = begin.elapsed();
        kill_again_and_again(&words(&killed), 6, time);
        assert!(planish().args(words(&killed)).output().unwrap().status.success());
        for name in [weights, "training.json", "manifest.json"] {
            let read = |d: &str| fs::read(Path::new(d).join(name)).unwrap();
            assert!(read(&whole) == read(&killed), "{command:?}: {name} differs");
        }
        assert!(!Path::new(&format!("{killed}.partial")).exists());
    }
}

#[test]
fn adapters_are_learned_over_codes_used_merged_and_exported() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, stories) = sample(&dir);
    let text = path(&dir, "numbers.txt");
    let count = |n: usize| (n..n + 40).map(|i| format!("{i} ")).collect::<String>();
    fs::write(&text, (0..80).map(|n| count(n * 7)).collect::<Vec<_>>().join("\n<|endoftext|>\n")).unwrap();
    let (small, gguf) = (path(&dir, "small"), path(&dir, "small.gguf"));
    let rounded = ["quantize", &folder, "--method", "rtn", "--data", &stories, "--calibration-tokens", "2000", "--out"];
    json(&[&rounded[..], &[&small, "--bits", "4"]].concat());
    json(&[&rounded[..], &[&gguf, "--storage", "q4_0"]].concat());
    for (base, lora) in [(&folder, "rank=8"), (&small, "rank=8,dora"), (&gguf, "rank=8,sites=q+v+up+0.down,rslora")] {
        let (out, again) = (path(&dir, "adapter"), path(&dir, "again"));
        let learn = |out: &str, words: &[&str]| {
            let words =
                [&lesson(base, &text, out)[..], &["--lora", lora, "--lr", "1e-2", "--overwrite"], words].concat();
            // The learning rate of a lesson is that of a whole model.
            let at = words.iter().position(|w| *w == "--lr").unwrap();
            json(&[&words[..at], &words[at + 2..]].concat())
        };
        let done = learn(&out, &[]);
        let number = |key: &str| done[key].as_f64().unwrap_or_else(|| panic!("{key} in {done}"));
        assert!(number("validation_loss") < 0.8 * number("validation_loss_before"), "{lora}: {done}");
        // Checkpoints of activations change no byte.
        learn(&again, &["--checkpoint-activations"]);
        for name in ["adapter_model.safetensors", "adapter_config.json", "training.json"] {
            let read = |d: &str| fs::read(Path::new(d).join(name)).unwrap();
            assert!(read(&out) == read(&again), "{lora}: {name} differs");
        }
        assert!(json(&["verify", &out])["faults"].as_array().unwrap().is_empty());
        let against = |model: &str, words: &[&str], other: &str| {
            let all = [&["evaluate", model, "--data", &text, "--against", other, "--documents", "8"], words].concat();
            json(&all)["against"].clone()
        };
        let taught = against(base, &["--adapter", &out], base);
        assert!(taught["perplexity_ratio"].as_f64().unwrap() < 0.7, "{lora}: {taught}");
        let said = json(&["generate", base, "--adapter", &out, "--prompt", "12 13 14 ", "--tokens", "8"]);
        assert_ne!(said["ids"], json(&["generate", base, "--prompt", "12 13 14 ", "--tokens", "8"])["ids"], "{lora}");
        let bench = ["bench", base, "--adapter", &out, "--prefill", "8", "--decode", "4", "--runs", "1"];
        assert!(json(&bench)["model"]["parameters"].as_u64() > json(&["inspect", base])["parameters"].as_u64());

        let merged = path(&dir, "merged");
        let _ = fs::remove_dir_all(&merged);
        json(&["export", base, "--adapter", &out, "--merge", "--to", "safetensors", "--type", "f32", "--out", &merged]);
        let apart = against(base, &["--adapter", &out], &merged);
        // Brain floats, where the base holds codes.
        assert!(apart["kl_mean"].as_f64().unwrap() < 1e-3, "{lora}: {apart}");
        let file = path(&dir, "adapter.gguf");
        let words = ["export", base, "--adapter", &out, "--to", "gguf", "--out", &file, "--overwrite"];
        if lora.contains("dora") {
            fails(&words, 2, "--merge");
        } else {
            assert!(json(&words)["largest_logit_difference"].as_f64().unwrap() < 1e-4);
            assert!(against(base, &["--adapter", &file], &merged)["kl_mean"].as_f64().unwrap() < 1e-3);
        }
        // It goes on learning where it was, and the same text tells it less.
        let on = path(&dir, "on");
        let words = [&lesson(base, &text, &on)[..], &["--adapter", &out, "--overwrite"]].concat();
        let at = words.iter().position(|w| *w == "--lr").unwrap();
        let more = json(&[&words[..at], &words[at + 2..]].concat());
        let [begun, ended] = ["validation_loss_before", "validation_loss"].map(|k| more[k].as_f64().unwrap());
        assert!((begun / number("validation_loss") - 1.0).abs() < 0.02, "{lora}: {more} after {done}");
        assert!(ended < begun, "{lora}: {more}");
        let kept: serde_json::Value =
            serde_json::from_slice(&fs::read(Path::new(&on).join("training.json")).unwrap()).unwrap();
        assert_eq!(kept["lesson"]["adapter"], serde_json::json!(out), "what it went on with is told");
        // Twice the same is twice the change.
        assert_ne!(against(base, &["--adapter", &out, "--adapter", &out], base), taught);
        fails(&["evaluate", &out, "--data", &text], 2, "--adapter");
    }
    let adapter = path(&dir, "adapter");
    fails(&["generate", &folder, "--adapter", &folder], 2, "adapter_config.json");
    fails(&["export", &folder, "--adapter", &adapter, "--to", "safetensors", "--out", "x"], 2, "--merge");
    fails(&["export", &folder, "--merge", "--to", "safetensors", "--out", "x"], 2, "--adapter");
    let wrong = |lora: &str, says: &str| {
        let out = path(&dir, "wrong");
        fails(&[&lesson(&folder, &text, &out)[..], &["--lora", lora]].concat(), 2, says);
        assert!(!Path::new(&out).exists());
    };
    wrong("rank=0", "rank=16,alpha=32");
    wrong("rank=4,sites=q+lm_head", "\"lm_head\"");
    wrong("rank=4,sites=99.q", "\"99.q\"");
    wrong("rank=4000", "rank=4000");
}

#[test]
fn adapters_of_a_rounded_student_learn_from_the_original() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let rounded = path(&dir, "rounded");
    json(&["quantize", &folder, "--method", "rtn", "--storage", "int2g32", "--calibrate", "self", "--out", &rounded]);
    let out = path(&dir, "adapter");
    let words = |more: &[&str]| {
        let all = lesson(&rounded, &text, &out);
        let at = all.iter().position(|w| *w == "--lr").unwrap();
        let teacher = ["distill", &rounded, "--teacher", &folder, "--share", "1"];
        [&teacher[..], &all[2..at], &all[at + 2..], &["--lr", "3e-3"], more]
            .concat()
            .iter()
            .map(|w| w.to_string())
            .collect::<Vec<_>>()
    };
    let run = |more: &[&str]| json(&words(more).iter().map(String::as_str).collect::<Vec<_>>());
    run(&["--lora", "rank=8", "--hidden", "0.1"]);
    let apart = |words: &[&str]| {
        let all = [&["evaluate", &rounded, "--data", &text, "--against", &folder, "--documents", "20"], words].concat();
        json(&all)["against"]["kl_mean"].as_f64().unwrap()
    };
    let (before, after) = (apart(&[]), apart(&["--adapter", &out]));
    println!("KL from the original: {before} rounded, {after} with adapters");
    assert!(after < 0.5 * before, "{before} {after}");
    let from_blocks =
        ["distill", "--teacher", &folder, "--student-layers", "0,1", "--data", &text, "--lora", "rank=8", "--out", "x"];
    fails(&from_blocks, 2, "STUDENT");
}

#[test]
fn lessons_that_cannot_be_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, text) = sample(&dir);
    let out = path(&dir, "out");
    let but = |data: &str, words: &[&str], code: i32, says: &str| {
        let mut all = lesson(&folder, data, &out);
        if let Some(at) = all.iter().position(|w| Some(w) == words.first()) {
            all.drain(at..at + 2);
        }
        all.extend(words);
        fails(&all, code, says);
        assert!(!Path::new(&out).exists());
    };
    let file = |name: &str, bytes: &[u8]| {
        fs::write(path(&dir, name), bytes).unwrap();
        path(&dir, name)
    };
    but(&file("empty.txt", b" \n"), &[], 2, "is empty");
    but(&file("tiny.txt", b"Tom sat."), &[], 2, "tokens to predict");
    but(&file("latin.txt", b"caf\xe9 au lait"), &[], 2, "byte 3 is not UTF-8");
    but(&text, &["--context", "100000"], 2, "--context 100000");
    but(&text, &["--precision", "int4"], 2, "f32, bf16");
    but(&text, &["--schedule", "round"], 2, "wsd");
    but(&text, &["--steps", "0"], 2, "--steps");
    but(&text, &["--lr", "nan"], 2, "--lr");
    // Numbers that grow beyond all bounds are named; what was good stays.
    but(&text, &["--lr", "1e30", "--warm-up", "0", "--clip", "0", "--restart"], 2, "step 2");
    assert!(dir.path().join("out.partial").exists());
    let small = path(&dir, "small");
    json(&["quantize", &folder, "--bits", "4", "--data", &text, "--out", &small]);
    fails(&lesson(&small, &text, &out), 2, "quantized");
}

#[test]
fn a_model_is_made_from_a_file_and_goes_on_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    sample(&dir);
    let file = |name: &str, tokenizer: &str, model: &str| {
        let config = format!(
            "[model]\narchitectures = ['LlamaForCausalLM']\nhidden_size = 64\nintermediate_size = 128\n\
             num_hidden_layers = 2\nnum_attention_heads = 4\n{model}\n[tokenizer]\n{tokenizer}\n\
             [data]\ntrain = 'stories.txt'\n[training]\nsteps = 60\nbatch = 8\nlr = 3e-3\ncheckpoint_every = 7\n"
        );
        fs::write(path(&dir, name), config).unwrap();
        path(&dir, name)
    };
    let good = file("good.toml", "vocab = 400", "max_position_embeddings = 96\ntie_word_embeddings = true");
    let (whole, killed) = (path(&dir, "whole"), path(&dir, "killed"));
    let begin = Instant::now();
    let done = json(&["train", &good, "--out", &whole]);
    let time = begin.elapsed();
    let number = |key: &str| done[key].as_f64().unwrap();
    assert!(number("validation_loss_before") > 5.5 && number("validation_loss") < 4.0, "{done}");
    let inspected = json(&["inspect", &whole]);
    assert!(inspected["parameters"].as_u64().unwrap() < 200_000, "{inspected}");
    // As a kill leaves it that comes before anything was written.
    fs::create_dir(path(&dir, "killed.start")).unwrap();
    kill_again_and_again(&["train", &good, "--out", &killed], 5, time);
    json(&["train", &good, "--out", &killed]);
    for name in ["model.safetensors", "tokenizer.json", "training.json", "manifest.json"] {
        let read = |d: &str| fs::read(Path::new(d).join(name)).unwrap();
        assert!(read(&whole) == read(&killed), "{name} differs");
    }
    assert!(!dir.path().join("killed.start").exists() && !dir.path().join("killed.partial").exists());

    let out = path(&dir, "out");
    let wrong = |tokenizer: &str, model: &str, says: &str| {
        fails(&["train", &file("wrong.toml", tokenizer, model), "--out", &out], 2, says);
    };
    let context = "max_position_embeddings = 96";
    wrong("", context, "one tokenizer");
    wrong("vocab = 400\nfrom = 'x'", context, "one tokenizer");
    wrong("vocab = 100000", context, "smaller vocabulary");
    wrong("words = 400", context, "unknown field");
    wrong("vocab = 400", "num_key_value_heads = 3", "num_key_value_heads");
    fails(&["train", &path(&dir, "none.toml"), "--out", &out], 2, "none.toml");
    fails(&["train", &good, "--data", &path(&dir, "none.txt"), "--out", &out], 2, "none.txt");
    // What lies where the model begins stays there, file or directory.
    let taken = path(&dir, "taken");
    fs::write(path(&dir, "taken.start"), "mine").unwrap();
    fails(&["train", &good, "--out", &taken], 2, "taken.start is in the way");
    fs::remove_file(path(&dir, "taken.start")).unwrap();
    fs::create_dir(path(&dir, "taken.start")).unwrap();
    fs::write(path(&dir, "taken.start/mine"), "mine").unwrap();
    fails(&["train", &good, "--out", &taken], 2, "taken.start is in the way");
    assert_eq!(fs::read_to_string(path(&dir, "taken.start/mine")).unwrap(), "mine");
    fs::write(path(&dir, "tokens.u16"), [1u8, 0, 0xff, 0xff, 3]).unwrap();
    fails(&["train", &good, "--data", &path(&dir, "tokens.u16"), "--out", &out], 2, "--tokenizer DIR");
    fails(&["train", &good, "--data", &path(&dir, "tokens.u16"), "--tokenizer", &whole, "--out", &out], 2, "5 bytes");
    fs::write(path(&dir, "tokens.u16"), [1u8, 0, 0xff, 0xff]).unwrap();
    fails(
        &["train", &good, "--data", &path(&dir, "tokens.u16"), "--tokenizer", &whole, "--out", &out],
        2,
        "token 1 is 65535",
    );
}

#[test]
fn of_conversations_only_the_answers_are_learned() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, _) = sample(&dir);
    fs::write(
        Path::new(&folder).join("chat_template.jinja"),
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    )
    .unwrap();
    let file = |name: &str, lines: Vec<String>| {
        fs::write(path(&dir, name), lines.join("\n")).unwrap();
        path(&dir, name)
    };
    let question = |n: usize| format!("How many birds are on tree {n}?");
    let chats = |n: usize| {
        let turns = [
            ("user", question(n)),
            ("assistant", "Seven.".into()),
            ("user", "And now?".into()),
            ("assistant", "Two.".into()),
        ];
        let turns: Vec<String> = turns.iter().map(|(r, c)| format!(r#"{{"role":"{r}","content":"{c}"}}"#)).collect();
        format!(r#"{{"messages":[{}]}}"#, turns.join(","))
    };
    let asked = |n: usize| format!(r#"{{"prompt":"{}","completion":" Seven."}}"#, question(n));
    for (name, lines) in [("chats", (0..200).map(chats).collect()), ("asked", (0..200).map(asked).collect::<Vec<_>>())]
    {
        let (data, out) = (file(&format!("{name}.jsonl"), lines), path(&dir, name));
        let words =
            ["finetune", &folder, "--data", &data, "--steps", "150", "--batch", "2", "--lr", "1e-3", "--out", &out];
        let done = json(&words);
        // Answers are certain, questions are not: a loss near zero is of the answers alone.
        assert!(done["validation_loss"].as_f64().unwrap() < 0.1, "{name}: {done}");
        assert!(done["validation_loss_before"].as_f64().unwrap() > 1.0, "{name}: {done}");
    }
    let out = path(&dir, "out");
    let wrong = |line: &str, says: &str| {
        let data = file("wrong.jsonl", vec![chats(1), line.into()]);
        fails(&["finetune", &folder, "--data", &data, "--out", &out], 2, says);
    };
    wrong("{\"text\": 3}", "line 2");
    wrong("{\"question\": \"?\"}", "\"prompt\"");
    wrong("not json", "line 2");
    wrong(r#"{"messages":[{"role":"user","content":"?"}]}"#, "assistant");
    let template = path(&dir, "template.jinja");
    fs::rename(Path::new(&folder).join("chat_template.jinja"), &template).unwrap();
    wrong(&chats(1), "--template FILE");
    let none = path(&dir, "none.jinja");
    fails(
        &["finetune", &folder, "--data", &path(&dir, "chats.jsonl"), "--template", &none, "--out", &out],
        2,
        "none.jinja",
    );
    // A template may lie elsewhere, and goes into the result.
    let data = path(&dir, "chats.jsonl");
    let words = ["finetune", &folder, "--data", &data, "--template", &template, "--steps", "3", "--out", &out];
    json(&words);
    let given = fs::read(Path::new(&out).join("chat_template.jinja")).unwrap();
    assert_eq!(given, fs::read(&template).unwrap());
    json(&["chat", &out, "--message", "How many birds are on tree 3?", "--tokens", "8"]);
}

#[test]
fn tables_and_lines_and_texts_teach_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, _) = sample(&dir);
    let table = Path::new(env!("CARGO_MANIFEST_DIR")).join("../formats/tests/tables/texts-snappy.parquet");
    let table = table.to_string_lossy().into_owned();
    let texts: Vec<String> = (0..40).map(|n| format!("Tom saw {n} birds. He counted them again and again.")).collect();
    let lines: Vec<String> = texts.iter().map(|text| serde_json::json!({ "text": text }).to_string()).collect();
    let file = path(&dir, "texts.jsonl");
    fs::write(&file, lines.join("\n")).unwrap();
    let learned = |data: &str, name: &str| {
        let out = path(&dir, name);
        json(&[
            "finetune",
            &folder,
            "--data",
            data,
            "--validation",
            &table,
            "--steps",
            "3",
            "--lr",
            "1e-3",
            "--out",
            &out,
        ]);
        fs::read(Path::new(&out).join("model.safetensors")).unwrap()
    };
    assert!(learned(&table, "table") == learned(&file, "lines"));
    // Other jobs take them as well.
    let out = path(&dir, "small");
    let said = json(&["quantize", &folder, "--bits", "4", "--data", &table, "--out", &out]);
    assert!(said["proof"]["after"]["bits_per_byte"].as_f64().unwrap() > 0.0, "{said}");
    let labels = table.replace("texts-snappy", "labels");
    let out = path(&dir, "wrong");
    fails(&["finetune", &folder, "--data", &labels, "--out", &out], 2, "has the columns label");
}
