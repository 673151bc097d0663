// Package expiration is the engine: it keeps the timers of MSC4140 and acts when they run out.
//
// There are two kinds of timers. The timer of an expiring event (the draft of 2024) sends a closing copy of an event that is in the room.
// The timer of a delayed event (the text as merged) sends an event that is not in the room yet. The engine sends each of them exactly
// once. It knows nothing of Dendrite: it calls a [Store] and a [Roomserver].
//
// # The life of a timer
//
// A timer has an event, a token, a duration and a deadline. The token of a delayed event is its delay ID.
//
//	step      expiring event                              delayed event
//	begin     Begin, before the event goes to the room    Schedule
//	go on     Refresh, Restart: a new deadline            RestartDelayed: a new deadline
//	delegate  Delegate, then KeepAlive or Finish          the same
//	act       the deadline passes, or End                 the deadline passes, or SendDelayed
//	stop      replaced, redacted, sender gone, room gone  CancelDelayed, deactivated, refused, room gone
//	after     the row is deleted                          the row is finalised, and pruned later
//
// An attempt to act has three steps. The event is built. It is claimed: outcome and finished event are written into the timer's row, if
// the row is unchanged since it was read. Only then does the roomserver get the event. When the room has it, the timer has ended.
//
// Package index lists the phases of a timer in memory, and the methods that change them.
//
// A [Delegation] says that a participant's connection to an SFU keeps a timer alive. The engine stores delegations and does not watch the
// SFU. The package that watches it calls KeepAlive and Finish.
//
// # Guarantees
//
// docs/guarantees.md says what users are promised, and which test shows it. In short:
//
//   - Durability. Begin, Schedule, Refresh, Restart, RestartDelayed, KeepAlive, Delegate and NoteSession return after their change is committed. A timer can be found while
//     its row is being written; a caller that finds it waits for the write.
//   - Delegations. A member has one delegation, the newest, and a delegation goes with its timer. After a start the engine does not act for
//     keptGrace on a timer with a delegation, so that the SFU can be asked first.
//   - After a crash. A claimed event is given to the roomserver again, with the same ID, and the roomserver ignores an event that it has.
//     An event that the roomserver had not finished is given to it again before anything is concluded from the room. An expiring event
//     that never reached its room is unknown to the roomserver when its deadline passes; its timer is dropped after an hour of asking.
//   - Idempotence. A repeated request is answered with the event, or the delay ID, of the first one.
//   - Exactly once. The claim is conditional in the database, and so is the cancellation of a delayed event. Of a refresh, an expiry and
//     a cancellation, one wins. A claimed event is never built a second time.
//   - Never early. Deadlines are compared by the monotonic clock. The wall clock counts only across a restart. Deadlines are rounded
//     up to the millisecond that the database keeps.
//   - Never over newer state. All sends of a piece of state on this server, and closing events, run under one lock. A closing event looks
//     under the lock whether its original is still the current state. An expired event bears its deadline as its time, so state resolution
//     prefers whatever another server sent later.
//   - Replaced tokens. Before the roomserver gets a state event, StateComes marks the timers that it may replace. After a crash the
//     next process looks at the room before it accepts their tokens.
//   - Order. The first attempts of one room run in the order of their deadlines. An attempt that failed at once keeps its place. An
//     attempt that the roomserver did not answer is repeated as a retry, after the first attempts.
//   - Isolation. Rooms do not wait for one another, and a sender whose attempts hang takes a bounded share. See package lanes.
//   - Hostile content. A panic in an attempt is an error of that attempt. An event that can never be sent is given up after
//     maxUnsendable attempts, one that the roomserver does not take after givenUpAfter. Each attempt ends after a minute at
//     most, once the database answers. Another user's send waits for sendPatience at most.
//
// # Memory
//
// A running timer takes less than 500 bytes: hashes of the names that it is found by, and times. The hashes, a [Digest], are stored too, so
// the start reads no names. Event, claim and content are in the row, which is read when the timer ends.
//
// # Concurrency
//
// All methods of [Timers] may be called from any goroutine. [Timers.Start] starts two goroutines: one watches the deadlines, one prunes.
// Before that it has one for each room with claimed timers, at most lanes.Places at a time, and waits for them. Each attempt has its own
// goroutine, at most two in a room and 168 in all. [Timers.Stop] ends them all and waits for them. A panic in any of them is logged with its
// stack and ends nothing else.
//
// A caller can give up until the database is asked; then certainly nothing was written (batch.ErrNotAsked). After that the caller waits for
// the answer, because a write that may still happen must not be overtaken. When clients hang up and retry while the database hangs, only
// one batch of each kind waits on.
//
// Locks are taken in this order. Any of them may be left out, and none is taken while a later one is held:
//
//  1. Timers.requests, by request: requests with one transaction ID are handled one by one, see [Timers.LockRequest].
//  2. Timers.attempting, by timer: one attempt at a time.
//  3. Timers.states, by (room, type, state key), see [Timers.LockState]. Under it the roomserver adapter takes its own lock for
//     the sends of one user in one room.
//  4. Timers.rows, by timer: one write to a row at a time, and memory says what was written last. Under it a read or a write waits for
//     the database. A new timer's lock is taken under Timers.mu; the lock of a new number is always free.
//  5. Timers.mu: the index. Nothing is waited for while it is held, except that [Timers.Start] reads the database.
//  6. Leaves: Lanes.mu, the mutex of each batch.Batches, and the locks inside keylock.Locks.
//
// The suffix of a function says which lock its caller holds: UnderRow is the lock of the timer's row, UnderRequest that of the request, and
// WithMu is Timers.mu. A function without these suffixes takes those locks itself.
package expiration
