//! temporary
mod config; mod tensors; mod gguf;
pub use config::{Family, ModelConfig}; pub use tensors::{Weights, to_f32}; pub use gguf::*;
use std::path::{Path,PathBuf};
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError { #[error("{0}")] X(String) }
impl CheckpointError { pub fn unsupported(s:String)->Self{Self::X(s)} pub fn io(d:&'static str,p:&Path,e:std::io::Error)->Self{Self::X(format!("{d} {} {e}",p.display()))} pub fn format(p:&Path,m:String)->Self{Self::X(format!("{} {m}",p.display()))} }
impl From<CheckpointError> for contract::StageError { fn from(e:CheckpointError)->Self{ Self::input(e.to_string()) } }
pub enum ModelFolder { Gguf{gguf:Gguf}, Safetensors{dir:PathBuf} }
impl ModelFolder { pub fn open(p:&Path)->Result<Self,CheckpointError>{ if p.is_file(){return Ok(Self::Gguf{gguf:Gguf::open(p)?});} for e in std::fs::read_dir(p).unwrap().flatten(){ if e.path().extension().is_some_and(|x|x=="gguf"){return Ok(Self::Gguf{gguf:Gguf::open(&e.path())?});}} Ok(Self::Safetensors{dir:p.to_owned()}) } }
