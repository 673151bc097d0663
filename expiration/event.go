package expiration

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/tidwall/gjson"
)

// StateKey names one piece of a room's state. For state events it is also what a newer event replaces.
type StateKey struct {
	RoomID string
	Type   string
	Key    string
}

// Event is what the component has to know of an event.
type Event struct {
	ID     string
	RoomID string
	Type   string
	// StateKey is nil for events that are not state. In rooms with pseudo IDs it is the state key as it stands in the
	// event.
	StateKey *string
	// Sender is the full ID of the user, also in rooms with pseudo IDs.
	Sender string
	// Request is nil for state, and for requests without a transaction ID. It is stored, and not kept in memory.
	Request *Request
}

// RequestHash is the SHA-256 of all that a client's transaction ID is unique for.
type RequestHash [32]byte

// Request is what is kept of the request that sent an event, so that it can be repeated after a crash and sends nothing
// new.
type Request struct {
	Hash   RequestHash
	Signed SignedEvent
}

// State returns the piece of state that the event sets, and false if it is not a state event.
func (e Event) State() (StateKey, bool) {
	if e.StateKey == nil {
		return StateKey{}, false
	}
	return StateKey{RoomID: e.RoomID, Type: e.Type, Key: *e.StateKey}, true
}

// decides reports whether an event can decide upon whether and how others come into the room: state of the room itself, and
// redactions.
func (e Event) decides() bool {
	return strings.HasPrefix(e.Type, "m.room.") && (e.StateKey != nil || e.Type == "m.room.redaction")
}

// Outcome says how a timer came to its end.
type Outcome string

const (
	// Expired: the deadline passed (contract, section 3).
	Expired Outcome = "expired"
	// Ended: a holder of the token called /end (contract, section 3), or had a delayed event sent before it was due.
	Ended Outcome = "ended"
)

// Running is the value of m.will_expire while the timer runs (contract, section 1).
const Running = "running"

// SignedEvent is an event as it is given to the roomserver, once or again.
type SignedEvent struct {
	EventID     string
	RoomVersion string
	PDU         []byte
}

// isUpon reports whether the event was built upon another one: knows of it, and directly. In old room versions prev_events has arrays of ID and hash.
func (e SignedEvent) isUpon(eventID string) bool {
	return strings.Contains(gjson.GetBytes(e.PDU, "prev_events").Raw, `"`+eventID+`"`)
}

// Claim is the decision, written once, how a timer ends, and the event that is sent: the closing event of an expiring event,
// or a delayed event itself.
type Claim struct {
	Outcome Outcome
	Event   SignedEvent
}

// TokenHash is the SHA-256 of a refresh token, the only form of it that is stored.
type TokenHash [32]byte

// Timer is one row of the store: an expiring event whose closing event is not yet known to be in the room, or a delayed
// event that is not.
type Timer struct {
	// NID is the number of the row, unique among all that there are, and positive.
	NID       int64
	Event     Event
	TokenHash TokenHash // of the refresh token, or of the delay ID
	// Delayed is nil if the event is an expiring one.
	Delayed  *Delayed
	Duration time.Duration
	// Received is when the event was accepted, Deadline when it expires. Both have whole milliseconds.
	Received time.Time
	Deadline time.Time
	// Claim is nil while the timer runs.
	Claim *Claim
}

// Refresh is the new deadline of a running timer.
type Refresh struct {
	NID      int64 // of the timer
	Duration time.Duration
	Deadline time.Time
}

// ConditionalClaim is a claim of a timer that must be running, with exactly this deadline.
type ConditionalClaim struct {
	NID      int64 // of the timer
	Deadline time.Time
	Claim
}

// Store keeps timers durably: what returned without error survives a crash of the process, and a power failure as far
// as the database does. An error says nothing about whether the write happened. Times have whole milliseconds. What is
// written to several timers is one commit, and names no timer twice.
//
// storage/storagetest is the suite that every implementation passes.
type Store interface {
	// Insert adds a running timer, and the digest that Index returns. It is an error if there is one for the event already.
	Insert(ctx context.Context, t Timer, d Digest) error
	// Refresh sets duration and deadline of running timers, and reports for each whether there was one.
	Refresh(ctx context.Context, refreshes []Refresh) ([]bool, error)
	// Claim ends running timers, and reports for each whether it was as its condition says.
	Claim(ctx context.Context, claims []ConditionalClaim) ([]bool, error)
	// Doubt removes the digests of timers. At the start it is looked whether the events of those without one were replaced.
	Doubt(ctx context.Context, nids []int64) error
	// Drop removes those of the timers that are running.
	Drop(ctx context.Context, nids []int64) error
	// Delete removes timers, claimed or not.
	Delete(ctx context.Context, nids []int64) error
	// Finalise replaces the timer of a delayed event by what became of it, and reports whether there was one; if running is
	// set, only if it is not claimed. Of the sender's finalised events the latest are kept, as many as keep says.
	Finalise(ctx context.Context, nid int64, f Final, running bool, keep int) (bool, error)
	// Finalised returns a delayed event by the hash of its delay ID, or ErrNotFound.
	Finalised(ctx context.Context, h TokenHash) (DelayedEvent, error)
	// FinalisedAs returns the IDs of the rows of the delayed events that were sent as those of the events, by their IDs.
	FinalisedAs(ctx context.Context, sender string, eventIDs []string) (map[string]string, error)
	// FinalisedSenders returns who has finalised events that were sent.
	FinalisedSenders(ctx context.Context) ([]string, error)
	// Requested returns the ID of the row that a request scheduled, finalised or not, or ErrNotFound.
	Requested(ctx context.Context, h RequestHash) (rowID string, err error)
	// Prune forgets what was finalised before a time.
	Prune(ctx context.Context, before time.Time) error
	// Read returns timers, and nil for each that is not there.
	Read(ctx context.Context, nids []int64) ([]*Timer, error)
	// Index calls f for each timer, in any order, until f returns an error, which it returns.
	Index(ctx context.Context, f func(Indexed) error) error
	// Ping returns an error if timers cannot be read or cannot be written now.
	Ping(ctx context.Context) error
}

// Roomserver is what the component needs of the homeserver.
//
// All but Replaced and CurrentState are called under the lock of the event's state key, if it has one. Their errors are a *DropError
// if there will never be a closing event, an *UnsendableError, ErrUnknownEvent, ErrSetBack, an error of claim, or a passing fault.
type Roomserver interface {
	// Confirm makes sure that the roomserver is done with an event that it was given before a crash or a fault: what it
	// knows of, it may have stored and not yet sent.
	Confirm(ctx context.Context, e Event) error
	// Close builds the closing event of e, with the given time as the time at which it was sent, or a later one if it would not be
	// after e's, calls claim with it, and if that succeeds gives it to the roomserver. It returns nil when the room has the closing event.
	// If lost is set, nobody waits any longer for e to become the current state again, and the error is not ErrSetBack.
	Close(ctx context.Context, e Event, o Outcome, timestamp time.Time, lost bool, claim func(context.Context, SignedEvent) error) error
	// Wake makes the roomserver go on with what a crash has left in its queue for a room, as far as that is due. By itself it does
	// so only when something comes for the room.
	Wake(ctx context.Context, roomID string) error
	// Send builds a delayed event, calls claim with it, and if that succeeds gives it to the roomserver. It returns the event's
	// ID when the room has it, without a claim if it is state that the room has already. The error can be a *RefusedError. If the outcome
	// is Ended, somebody waits for the answer.
	Send(ctx context.Context, t Timer, o Outcome, claim func(context.Context, Built) error) (eventID string, err error)
	// Resubmit gives an event that was built for a timer earlier to the roomserver again: the one that was claimed, or, if
	// the timer's event is a message, that event itself. It returns nil when the room has it.
	Resubmit(ctx context.Context, t Timer, signed SignedEvent) error
	// Replaced reports whether a newer event is the current state in the place of a state event. That an expiring event is not
	// the current state is not enough, see ErrSetBack; for a delayed event the newer one must be another user's, and newer
	// than what it was scheduled over.
	Replaced(ctx context.Context, t Timer) (bool, error)
	// CurrentState returns the ID of the event that is the current state, or "" if there is none.
	CurrentState(ctx context.Context, s StateKey) (string, error)
}

// DropReason says why an event gets no closing event (contract, section 3).
type DropReason string

const (
	// Replaced: a newer event is the current state.
	Replaced DropReason = "replaced"
	// Redacted: the original has no content any more.
	Redacted DropReason = "redacted"
	// SenderGone: the sender is no longer joined.
	SenderGone DropReason = "sender_gone"
	// Forbidden: the sender may no longer send such an event.
	Forbidden DropReason = "forbidden"
	// RoomGone: the room was purged.
	RoomGone DropReason = "room_gone"
	// NeverSent: the event never came into its room.
	NeverSent DropReason = "never_sent"
	// Unsendable: no attempt to send the closing event can succeed, see UnsendableError.
	Unsendable DropReason = "unsendable"
	// Unanswered: the roomserver has the closing event, and for more than an hour has not said what became of it.
	Unanswered DropReason = "unanswered"
	// Deactivated: the sender's account is deactivated. Only a delayed event is dropped for this reason.
	Deactivated DropReason = "deactivated"
)

// DropError is the final reason why no closing event was sent.
type DropError struct {
	Reason DropReason
	// Cause may be nil.
	Cause error
}

func (e *DropError) Error() string {
	if e.Cause == nil {
		return "no closing event: " + string(e.Reason)
	}
	return fmt.Sprintf("no closing event: %s: %s", e.Reason, e.Cause)
}

func (e *DropError) Unwrap() error { return e.Cause }

// isRefusal reports whether whoever asked for the event is to be told that it may not be sent. e may be nil.
func (e *DropError) isRefusal() bool {
	return e != nil && (e.Reason == Forbidden || e.Reason == SenderGone || e.Reason == Unsendable)
}

// isOfMoment reports whether the reason may be another one, or none, when the event would be due again.
func (e *DropError) isOfMoment() bool { return e.Reason == Forbidden || e.Reason == Unsendable }

// LimitError is the error of Begin and Schedule for a user who has as many running timers, or scheduled events, as are allowed.
type LimitError struct {
	// RetryAfter is how long it is until the first of the user's timers runs out, if nobody refreshes it, or is looked at again
	// if it has.
	RetryAfter time.Duration
}

func (e *LimitError) Error() string { return "too many running timers" }

var (
	// ErrNotFound: there is no running timer for the token or event.
	ErrNotFound = errors.New("no running timer")
	// ErrTooLarge: the closing event would not fit into an event.
	ErrTooLarge = errors.New("the closing event would be too large")
	// ErrSetBack: the event is not the current state, but nothing newer is: a crash can set the state of a room back to
	// what it was earlier, until the roomserver has brought what lay in its queue. After a fault of its database it does not.
	ErrSetBack = errors.New("the state of the room was set back")
	// ErrUnknownEvent: the roomserver does not know the event; it may still be queued there.
	ErrUnknownEvent = errors.New("the roomserver does not know the event")
)
