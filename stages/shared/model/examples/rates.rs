//! Prints the rates of prefill, a LoRA training step and batch-16 decoding:
//! `cargo run --release -p model --example rates -- MODEL.gguf`.
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "an example")]

use std::path::Path;
use std::time::Instant;

use model::{GenerateOptions, LoraConfig, MicroBatch, Model, PROJECTIONS};

fn tokens(n: usize) -> Vec<i32> {
    (0..n).map(|i| 3 + (i * 7919 % 49000) as i32).collect()
}

fn main() {
    let path = std::env::args().nth(1).unwrap();
    let start = Instant::now();
    let model = Model::load(Path::new(&path)).unwrap();
    println!("load {:.2} s, {:?}", start.elapsed().as_secs_f64(), model.backend());
    let best = |mut f: Box<dyn FnMut() + '_>| {
        f();
        (0..3).map(|_| { let t = Instant::now(); f(); t.elapsed().as_secs_f64() }).fold(f64::MAX, f64::min)
    };
    let ids = tokens(512);
    let none = GenerateOptions { max_new_tokens: 1, end_tokens: vec![], batch_size: 1 };
    let prompt = vec![ids.iter().map(|t| *t as u32).collect::<Vec<_>>()];
    let s = best(Box::new(|| model.generate(None, &prompt, &none, &mut |_| true).unwrap()));
    println!("prefill 1 x 512: {:.0} tok/s", 512.0 / s);
    let lora = LoraConfig { r: 16, alpha: 16.0, dropout: 0.0, targets: PROJECTIONS.map(str::to_owned).to_vec() };
    let adapter = model.new_adapter(&lora, 1).unwrap();
    let ids = tokens(1024);
    let cu = [0, 256, 512, 768, 1024];
    let mut targets: Vec<i32> = ids[1..].to_vec();
    targets.push(-100);
    for i in cu { if i > 0 { targets[i as usize - 1] = -100; } }
    let mut grad = vec![0.0; adapter.values.len()];
    let s = best(Box::new(|| {
        let batch = MicroBatch { tokens: &ids, cu_seqlens: &cu, targets: &targets };
        model.loss_and_grad(&adapter, batch, 1e-3, None, &mut grad).unwrap();
    }));
    println!("train 4 x 256, loss on all: {:.0} tok/s", 1024.0 / s);
    let prompts: Vec<Vec<u32>> = (0..16).map(|i| tokens(256 + i)[i..].iter().map(|t| *t as u32).collect()).collect();
    let run = |new: usize| {
        let options = GenerateOptions { max_new_tokens: new, end_tokens: vec![], batch_size: 16 };
        best(Box::new(|| model.generate(None, &prompts, &options, &mut |_| true).unwrap()))
    };
    let (short, long) = (run(1), run(33));
    println!("batch-16 prefill {:.0} tok/s, decode {:.0} tok/s", 16.0 * 256.0 / short, 16.0 * 32.0 / (long - short));
}
