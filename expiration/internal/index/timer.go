package index

import (
	"fmt"
	"time"
)

// TokenSize is how many bytes of a token's hash are kept in memory. 128 bits cannot be guessed.
const TokenSize = 16

// Row is the part of a timer's row that memory keeps. Each uint64 is the hash of a name, or 0 for none.
type Row struct {
	NID    int64 // the row's number
	Token  [TokenSize]byte
	Room   uint64
	Sender uint64
	// State is the piece of state, or 0 if the event is not state.
	State uint64
	// Request is the request that sent the event, or 0 if the request has no transaction ID.
	Request  uint64
	Received int64 // in milliseconds of the wall clock
	Kind     Kind
	Claimed  bool
	Duration time.Duration
	Deadline int64 // in milliseconds of the wall clock
}

// Kind tells apart the timers whose numbers have limits of their own for each user.
type Kind uint8

const (
	// Expiring: the timer of an expiring event.
	Expiring Kind = iota
	// Delayed: the timer of a delayed event that the user has scheduled.
	Delayed
	// ServiceDelayed: the timer of a delayed event that an application service has scheduled for the user.
	ServiceDelayed

	kinds
)

// Phase is where a timer is in its life. See the table in the package comment.
type Phase uint8

const (
	// Pending: the row is being written, or the roomserver has not answered yet. The scheduler does not look at the timer.
	Pending Phase = iota
	// Running: the scheduler looks at the timer when it is due.
	Running
	// Claimed: the row says how the timer ends. The roomserver has the event, or is about to get it.
	Claimed
	// Stopped: the timer ended without a claim. Its row must be deleted.
	Stopped
	// Finished: the timer ended after it was claimed. Its row must be deleted.
	Finished
	// Gone: the row is deleted.
	Gone
)

func (p Phase) String() string {
	return [...]string{"pending", "running", "claimed", "stopped", "finished", "gone"}[p]
}

// Doubts is a set of facts about a timer that are uncertain.
type Doubts uint8

const (
	// RowUnsure: a write failed that may have changed the row. Read the row before concluding anything.
	RowUnsure Doubts = 1 << iota
	// MaybeReplaced: the event may no longer be the current state. Ask the roomserver before a token is used.
	MaybeReplaced
	// Superseded: this server sent newer state, which most likely replaced the event. Until that is checked, the timer does not count
	// against its sender's limit. Superseded implies MaybeReplaced.
	Superseded
)

// Presence says what is known about whether an expiring event is in its room.
type Presence uint8

const (
	// Unconfirmed: this process has not asked the roomserver.
	Unconfirmed Presence = iota
	// Unsent: the roomserver failed to take the event, or does not know it.
	Unsent
	// Confirmed: the roomserver has said that the event is in its room.
	Confirmed
)

// Timer is a timer in memory. Its event is in the row, which is read when the timer ends. There can be a million of them, so the fields
// are ordered by size.
type Timer struct {
	// These never change.
	nid                          int64
	token                        [TokenSize]byte
	room, sender, state, request uint64
	received                     int64

	// Duration and Deadline agree with the row. Due is the same moment as Deadline by the monotonic clock, or a later
	// one: after a start with a grace period.
	Duration time.Duration
	Deadline int64
	Due      time.Duration
	// Asked is the rate limit of requests with the token.
	Asked time.Duration

	ofState, ofSender links // the lists of timers of the same state, and of the same kind and sender

	wake  time.Duration // when the scheduler looks at the timer, if place is not -1
	place int32         // the position in the heap, or -1
	// attempts counts those that have begun and are not over.
	attempts uint16

	// Presence is only of interest for expiring events.
	Presence Presence
	// Failures counts the attempts that failed since the last one that did not. It makes the pauses grow.
	Failures uint8
	// Awaited counts how many times in a row the roomserver had not caught up after a crash.
	Awaited uint8
	// Unsendable counts the attempts that failed because the event cannot be sent, and Untaken those in which the roomserver did not take it.
	Unsendable, Untaken uint8
	// Unanswered: an attempt has taken all its time, although the roomserver worked otherwise.
	Unanswered bool

	kind   Kind // never changes
	phase  Phase
	doubts Doubts
	raised uint8 // counts the calls of Doubt, and wraps around
}

// init makes it the timer of a row, which is Pending.
func (tm *Timer) init(row Row, due time.Duration) {
	*tm = Timer{
		nid: row.NID, token: row.Token, room: row.Room, sender: row.Sender, state: row.State, request: row.Request,
		received: row.Received, kind: row.Kind, Duration: row.Duration, Deadline: row.Deadline, Due: due, place: -1,
	}
}

// NID returns the number of the timer's row. It, and the methods up to Delayed, return what never changes, and need no lock.
func (tm *Timer) NID() int64     { return tm.nid }
func (tm *Timer) Room() uint64   { return tm.room }
func (tm *Timer) Sender() uint64 { return tm.sender }
func (tm *Timer) State() uint64  { return tm.state }

// Token returns the first bytes of the token's hash.
func (tm *Timer) Token() [TokenSize]byte { return tm.token }

// Received returns when the event was accepted, by the wall clock.
func (tm *Timer) Received() time.Time { return time.UnixMilli(tm.received) }

// Delayed reports whether the timer is that of a delayed event. nil is not.
func (tm *Timer) Delayed() bool { return tm != nil && tm.kind != Expiring }

// Phase returns the phase. It is Gone for nil.
func (tm *Timer) Phase() Phase {
	if tm == nil {
		return Gone
	}
	return tm.phase
}

// Live reports whether the timer has not ended.
func (tm *Timer) Live() bool { return tm.Phase() <= Claimed }

// Running reports whether the timer is neither ended nor claimed. Its token is valid then.
func (tm *Timer) Running() bool { return tm.Phase() <= Running }

// IsLeft reports whether the timer has ended and its row is not deleted yet.
func (tm *Timer) IsLeft() bool { return tm.Phase() == Stopped || tm.Phase() == Finished }

// Raised returns a number that changes each time a doubt is added.
func (tm *Timer) Raised() uint8 { return tm.raised }

// Has reports whether the timer has one of these doubts.
func (tm *Timer) Has(d Doubts) bool { return tm != nil && tm.doubts&d != 0 }

// Doubt adds doubts.
func (tm *Timer) Doubt(d Doubts) {
	if d&Superseded != 0 {
		d |= MaybeReplaced
	}
	tm.doubts |= d
	tm.raised++
}

// Resolve removes doubts.
func (tm *Timer) Resolve(d Doubts) {
	if d&MaybeReplaced != 0 {
		d |= Superseded
	}
	tm.doubts &^= d
}

// Wake returns when the scheduler looks at the timer, and false if it does not.
func (tm *Timer) Wake() (wake time.Duration, scheduled bool) { return tm.wake, tm.place >= 0 }

func ofSender(tm *Timer) *links { return &tm.ofSender }

func (tm *Timer) String() string { return fmt.Sprintf("timer %d (%s)", tm.nid, tm.phase) }
