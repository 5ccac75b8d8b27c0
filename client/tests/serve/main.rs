//! `outrigger serve`: chats and completions over real connections.

mod answers;
mod common;
mod faults;
mod marks;
mod process;
