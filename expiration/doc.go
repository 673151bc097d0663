// Package expiration keeps the timers of MSC4140: of expiring events (the draft of 2024), and sees to it that each of them is
// closed exactly once; and of delayed events (the accepted text), and sees to it that each of them is sent exactly once.
//
// # The life of a timer
//
//	            Begin                 claim                 the room has the event
//	(no timer) -------> running -----------------> claimed -------------------------------> (gone)
//	           Schedule  |   ^                        |
//	                     |   | Refresh, Restart,      | the state was replaced meanwhile,
//	                     |   | RestartDelayed         | the sender or the room is gone
//	                     |   +--- (new deadline)      +------------------------------------> (gone)
//	                     |
//	                     | expiring: replaced, redacted, sender gone, room purged
//	                     | delayed: cancelled, replaced by another user, refused when due, room purged
//	                     +-----------------------------------------------------------------> (gone)
//
// A running timer has an event, a token, a duration and a deadline. When the deadline passes ([Expired]) or somebody
// who holds the token says so ([Ended]), an event is built and claimed: outcome and finished event are written into the
// timer's row, on condition that the row is still as it was seen. Only then does that event go to the roomserver, and when
// the room has it the timer is gone.
//
// The two kinds differ in what is sent, in what stops the timer, and in what is left of it. The timer of an expiring event
// sends the closing event of an event that is in the room. That of a delayed event ([Delayed]) has the content in its row and
// sends that; its token is the delay ID, and its Event.ID the row's own. What is gone of an expiring event is deleted. The
// row of a delayed event is finalised instead ([Final]), whatever became of it, and pruned when it was kept for long enough.
//
// # Guarantees
//
// What is promised to users, and which test shows it, stands in docs/guarantees.md. In short:
//
// Durability: Begin returns after the row is committed, and before the event is given to the roomserver; Schedule returns
// after the row is committed. A timer can be found before that, and whoever finds it waits until it is decided whether there is
// a row: so none is taken for one that has no row any more, and none is dropped before its row comes. Refresh, Restart and
// RestartDelayed return after the new deadline is committed, together with those of others that came meanwhile. A row whose event
// never came into the room is found out when its deadline passes,
// because the roomserver does not know the event. An event that the roomserver had when the process died, but had not yet
// finished with, is given to it again before anything is concluded from what is in the room. Which timers a state event may
// replace is written down before the roomserver gets it (StateComes): the next process looks before it believes in their tokens.
//
// Nothing twice: a request that is repeated, after a crash or after the roomserver failed to take its event, is answered with
// the event that was built for it first, which is given to the roomserver again if need be. A request that scheduled an event
// is answered with the same delay ID for as long as it is known what became of the event.
//
// Exactly one closing event, and a delayed event once: the claim is conditional in the database, and so is what finalises a
// delayed event that is cancelled. Of a refresh, an expiry and a cancellation, or of several closings, one wins. What was
// claimed is never built a second time: after a fault or a crash the same event, with the same ID, is given to the
// roomserver again, which ignores an event that it has.
//
// What is due is not trusted: its content was written by a stranger, and goes into the middle of Dendrite when nobody waits for the
// error. A panic in an attempt is an error like others. What fails although neither store nor roomserver did (UnsendableError) is given up
// after maxUnsendable attempts, and what the roomserver has and does not answer after givenUpAfter; each attempt ends after seconds,
// see failing.go. A send of somebody else waits for sendPatience at most.
//
// Never early: a deadline is compared by the monotonic clock while the process lives, so a step of the wall clock fires
// nothing. The wall clock counts only across a restart. Deadlines are rounded up to the millisecond that the database
// keeps.
//
// Never over a newer state: everything that this server itself sends as state is built and given to the roomserver under
// the lock of its (room, type, state key), and so is a closing event, which looks under that lock whether its original
// is still the current state, and looks again when it is built, because other servers take no part in the lock. The closing
// event of an event that expired bears the deadline as its time, so that what another server sent after the deadline is
// later, and wins where the two cross. A delayed event for state looks, under the same lock, whether another user has set
// that state since it was scheduled.
//
// Ordering: the first attempts for the due timers of one room, of whichever kind they are, come one after the other in the order
// of the deadlines. Some events are built and claimed while the roomserver has the one before, unless that may decide upon others, and are
// given to it when that is done. What the roomserver did not answer in time is tried again after the first attempts that wait in its room,
// but for one retry in nine attempts; what failed otherwise keeps its place.
//
// Isolation: rooms do not wait for one another. Of the rooms that wait for a place the one with the earliest deadline is next, but
// what hangs takes little from others. A first attempt holds its place for two seconds; then another room has it, while its own
// still waits for it. One sender always has two places, and up to eight more are lent to all senders together. Retries have eight
// places of their own, which their senders get in turns. When an attempt has hung and failed, all timers of its sender count as
// retries for two minutes, also those that were not attempted yet: so in any room others wait for one attempt of such a sender, not
// for all of them. The bounds stand in internal/lanes/places.go, each with its reason.
//
// # Memory
//
// A running timer takes less than 200 bytes, in an index without pointers: hashes of what it is looked up by, and times. Those
// hashes, a [Digest], are stored too: the start reads them, and no names. A ref names a timer and is good for nothing once it
// is gone; its place in memory may be another's then. The event, the claim, the content of a delayed event and the closing event
// stand in the rows, which are read when the timer is closed. Beside the index there are the delayed events that are claimed and
// not yet finalised, and a number for each user who has some that were sent: most answers of the sync API are for none of them.
//
// # Concurrency
//
// All methods of [Timers] may be called from any goroutine. [Timers.Start] starts one goroutine that watches the
// deadlines, and one that prunes. Each attempt has a goroutine of its own, two in a room and 168 in all at the most. An attempt starts
// one that deletes the rows of all that was closed within a second, and ends by itself. [Timers.Stop] ends them all and waits for
// them. A panic in any of them is logged with its stack, and ends nothing else; one while a batch is written is an error for all who
// wait for that batch.
//
// Waiting ends with the caller's context until the database is asked, whether for a lock or for the turn of a batch: a question that
// was not asked yet is taken back, and then certainly nothing was written (batch.ErrNotAsked). After that the caller waits for the answer,
// however long: what may still be written must not be overtaken. So of clients who hang up and try again while the database hangs,
// only those wait on whose question it was asked, at most one batch of each kind.
//
// Locks are taken in this order, any of them may be left out, and none is taken while a later one is held:
//
//  1. the lock of a request in Timers.requests, see [Timers.LockRequest]: requests with one transaction come one by one
//  2. the timer's lock in Timers.closings: one attempt to close it at a time
//  3. the lock of a (room, type, state key) in Timers.states, see [Timers.LockState]; under it the roomserver's own lock
//     for sends of one user in one room is taken
//  4. the timer's lock in Timers.rows: one write to its row at a time, and memory says what was written last; under it a
//     read or write waits for the turn of its batch, or for whoever has it, who takes no other lock meanwhile. A new timer's row is
//     inserted under it: only for that is it taken under Timers.mu, where nobody else can have the lock of a number that is new
//  5. Timers.mu: the index in memory; held while nothing is waited for, but by [Timers.Start] for the database, and for those who
//     make the index
//  6. leaves: Lanes.mu, the mu of each batch.Batches, and the locks inside keylock.Locks
//
// The package knows nothing of Dendrite. What it needs it asks of a [Store] and a [Roomserver].
package expiration
