package expiration

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/tidwall/gjson"
)

// StateKey identifies one piece of a room's state.
type StateKey struct {
	RoomID string
	Type   string
	Key    string
}

// Event is what the engine knows of an event.
type Event struct {
	ID     string
	RoomID string
	Type   string
	// StateKey is nil for events that are not state. In rooms with pseudo IDs it is the state key as the event has it.
	StateKey *string
	// Sender is the full user ID, also in rooms with pseudo IDs.
	Sender string
	// Request is nil for state events, and for requests without a transaction ID. It is stored, but not kept in memory.
	Request *Request
}

// RequestHash is the SHA-256 of everything within which a client's transaction ID is unique.
type RequestHash [32]byte

// Request is what is stored of the request that sent an event. With it, a request that is repeated after a crash gets the same event and
// sends no new one.
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

// affectsAuth reports whether an event may influence whether other events are allowed: a state event of the room itself, or a redaction.
func (e Event) affectsAuth() bool {
	return strings.HasPrefix(e.Type, "m.room.") && (e.StateKey != nil || e.Type == "m.room.redaction")
}

// Outcome says how a timer ended.
type Outcome string

const (
	// Expired: the deadline passed (docs/protocol.md, "Closing").
	Expired Outcome = "expired"
	// Ended: a request ended the timer before its deadline: `end` with the token, or `send` with the delay ID.
	Ended Outcome = "ended"
)

// Running is the value of m.will_expire while the timer runs (docs/protocol.md, "Sending").
const Running = "running"

// SignedEvent is a finished event in the form in which the roomserver gets it, the first time or again.
type SignedEvent struct {
	EventID     string
	RoomVersion string
	PDU         []byte
}

// isUpon reports whether another event is among this event's prev events. In old room versions prev_events has pairs of ID and hash.
func (e SignedEvent) isUpon(eventID string) bool {
	return strings.Contains(gjson.GetBytes(e.PDU, "prev_events").Raw, `"`+eventID+`"`)
}

// Claim is the decision how a timer ends, and the event that is sent: the closing event, or the delayed event itself. It is written once.
type Claim struct {
	Outcome Outcome
	Event   SignedEvent
}

// TokenHash is the SHA-256 of a refresh token or a delay ID. No other form of it is stored.
type TokenHash [32]byte

// Timer is one row of the store. An expiring event has one until the room has its closing event, a delayed event until the room has the
// event itself.
type Timer struct {
	// NID is the row's number. It is positive and unique among the existing rows.
	NID       int64
	Event     Event
	TokenHash TokenHash // of the refresh token, or of the delay ID
	// Delayed is nil for an expiring event.
	Delayed  *Delayed
	Duration time.Duration
	// Received is when the event was accepted, and Deadline when the timer expires. Both have whole milliseconds.
	Received time.Time
	Deadline time.Time
	// Claim is nil while the timer runs.
	Claim *Claim
}

// Refresh sets the new deadline of a running timer.
type Refresh struct {
	NID      int64 // of the timer
	Duration time.Duration
	Deadline time.Time
}

// ConditionalClaim is a claim that succeeds only if the timer is running and has exactly this deadline.
type ConditionalClaim struct {
	NID      int64 // of the timer
	Deadline time.Time
	Claim
}

// Store keeps timers durably. A call that returned nil survives a crash of the process, and a power failure as far as the database does.
// After an error the write may have happened or not. Times have whole milliseconds. A call for several timers is one commit, and does not
// contain a timer twice.
//
// storage/suite_test.go is the suite that every implementation passes.
type Store interface {
	// Insert adds a running timer, and the digest that Index returns. It fails if the event already has a timer.
	Insert(ctx context.Context, t Timer, d Digest) error
	// Refresh sets duration and deadline of running timers. It reports for each refresh whether the timer was running.
	Refresh(ctx context.Context, refreshes []Refresh) ([]bool, error)
	// Claim claims running timers. It reports for each claim whether its condition held.
	Claim(ctx context.Context, claims []ConditionalClaim) ([]bool, error)
	// Doubt removes the digests of timers. The next start asks, for each timer without a digest, whether its event was replaced.
	Doubt(ctx context.Context, nids []int64) error
	// Drop removes those of the timers that are not claimed.
	Drop(ctx context.Context, nids []int64) error
	// Delete removes timers, claimed or not.
	Delete(ctx context.Context, nids []int64) error
	// Finalise replaces the row of a delayed event by its result, and reports whether the row existed. If running is set, a claimed row
	// does not count. Of each sender's finalised events the latest keep are kept.
	Finalise(ctx context.Context, nid int64, f Final, running bool, keep int) (bool, error)
	// Finalised returns a delayed event by the hash of its delay ID, or ErrNotFound.
	Finalised(ctx context.Context, h TokenHash) (DelayedEvent, error)
	// FinalisedAs returns, by event ID, the row IDs of those events that the sender sent as delayed events. If several rows have one event,
	// that is the row that was finalised first.
	FinalisedAs(ctx context.Context, sender string, eventIDs []string) (map[string]string, error)
	// FinalisedSenders returns the users who have finalised events that were sent.
	FinalisedSenders(ctx context.Context) ([]string, error)
	// Requested returns the ID of the row that a request created, finalised or not, or ErrNotFound.
	Requested(ctx context.Context, h RequestHash) (rowID string, err error)
	// Prune deletes the events that were finalised before a time, and Erase all finalised events of a sender.
	Prune(ctx context.Context, before time.Time) error
	Erase(ctx context.Context, sender string) error
	// Read returns the timers, and nil for each that does not exist.
	Read(ctx context.Context, nids []int64) ([]*Timer, error)
	// Index calls f for every timer, in any order. It stops at the first error of f, and returns that.
	Index(ctx context.Context, f func(Indexed) error) error
	// Ping returns an error unless timers can be read and written now.
	Ping(ctx context.Context) error
}

// Roomserver is what the engine needs of the homeserver.
//
// All methods except Replaced are called under the lock of the event's state key, if it has one. Their errors are a
// *DropError if the event will never be sent, an *UnsendableError, ErrUnknownEvent, ErrSetBack, an error of claim, or a passing fault.
type Roomserver interface {
	// Confirm makes sure that the roomserver has finished an event that it got before a crash or a fault. An event that it knows may be
	// stored but not sent yet.
	Confirm(ctx context.Context, e Event) error
	// Close builds the closing event of e, calls claim with it, and gives it to the roomserver if claim succeeds. It returns nil when the
	// room has the closing event. The closing event bears the given timestamp, or a later one if it would not be after that of e. If lost
	// is set, Close no longer waits for e to become the current state again, and never returns ErrSetBack.
	Close(ctx context.Context, e Event, o Outcome, timestamp time.Time, lost bool, claim func(context.Context, SignedEvent) error) error
	// Wake makes the roomserver process what a crash has left in its queue for a room, as far as it is due. Otherwise the roomserver does
	// so only when a new event arrives for the room.
	Wake(ctx context.Context, roomID string) error
	// Send builds a delayed event, calls claim with it, and gives it to the roomserver if claim succeeds. It returns the event's ID when
	// the room has it. If the event is state that the room has already, Send returns the ID of the existing event and does not call claim.
	// The error can also be a *RefusedError. If the outcome is Ended, a caller waits for the answer.
	Send(ctx context.Context, t Timer, o Outcome, claim func(context.Context, Built) error) (eventID string, err error)
	// Resubmit gives an event that was built earlier to the roomserver again: the claimed event, or the timer's own event if that is a
	// message. It returns nil when the room has it.
	Resubmit(ctx context.Context, t Timer, signed SignedEvent) error
	// Replaced reports whether a newer event is the current state in place of an expiring event. It is not enough that another event is
	// the current state, see ErrSetBack.
	Replaced(ctx context.Context, e Event) (bool, error)
}

// DropReason says why an event gets no closing event (docs/protocol.md, "Closing"), or why a delayed event is not sent.
type DropReason string

const (
	// Replaced: a newer event is the current state.
	Replaced DropReason = "replaced"
	// Redacted: the original was redacted.
	Redacted DropReason = "redacted"
	// SenderGone: the sender is no longer joined.
	SenderGone DropReason = "sender_gone"
	// Forbidden: the sender may no longer send such an event.
	Forbidden DropReason = "forbidden"
	// RoomGone: the room was purged.
	RoomGone DropReason = "room_gone"
	// NeverSent: the event never reached its room.
	NeverSent DropReason = "never_sent"
	// Unsendable: every attempt to send the event failed in the same way, see UnsendableError.
	Unsendable DropReason = "unsendable"
	// Unanswered: the roomserver got the event, and did not answer for more than an hour while it answered others.
	Unanswered DropReason = "unanswered"
	// Deactivated: the sender's account is deactivated. Only a delayed event is dropped for this reason.
	Deactivated DropReason = "deactivated"
)

// reasons says what follows from each reason, beyond that nothing is sent.
var reasons = map[DropReason]struct {
	refusal bool // the caller of End or SendDelayed is told that the event may not be sent
	mayPass bool // the reason may no longer hold at a later deadline
	cancels bool // a delayed event ends as cancelled, and not with an error
}{
	Replaced:    {},
	Redacted:    {},
	SenderGone:  {refusal: true},
	Forbidden:   {refusal: true, mayPass: true},
	RoomGone:    {},
	NeverSent:   {},
	Unsendable:  {refusal: true, mayPass: true},
	Unanswered:  {},
	Deactivated: {cancels: true},
}

// DropError says for good that no event is sent, and why.
type DropError struct {
	Reason DropReason
	// Cause may be nil.
	Cause error
}

func (e *DropError) Error() string {
	if e.Cause == nil {
		return "the event is not sent: " + string(e.Reason)
	}
	return fmt.Sprintf("the event is not sent: %s: %s", e.Reason, e.Cause)
}

func (e *DropError) Unwrap() error { return e.Cause }

// LimitError is the error of Begin and Schedule for a user who has reached the limit of running timers or scheduled events. A delayed event
// that is due has it as its cause if too many of the user's events were due lately.
type LimitError struct {
	// RetryAfter is the time until the first of the user's timers expires, or, if that is overdue, until its next attempt.
	RetryAfter time.Duration
}

func (e *LimitError) Error() string { return "too many timers of the user" }

var (
	// ErrNotFound: there is no running timer for the token or event.
	ErrNotFound = errors.New("no running timer")
	// ErrTooLarge: the closing event would not fit into an event.
	ErrTooLarge = errors.New("the closing event would be too large")
	// ErrSetBack: neither the event nor a newer one is the current state. A crash can set a room's state back until the roomserver has
	// processed its queue. After a fault of the roomserver's database the state stays set back.
	ErrSetBack = errors.New("the state of the room was set back")
	// ErrUnknownEvent: the roomserver does not know the event. It may still be in the roomserver's queue.
	ErrUnknownEvent = errors.New("the roomserver does not know the event")
)
