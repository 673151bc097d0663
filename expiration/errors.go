package expiration

import (
	"errors"
	"fmt"
	"time"
)

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
	// Unanswered: the roomserver got the event, and did not take it for more than an hour while it took others.
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
	// RetryAfter is the time until the first of the user's timers has probably ended: until it expires, or, if that is overdue, until its next
	// attempt, and as long as an attempt takes. For an event that is due it is the time until the next one would be allowed.
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
