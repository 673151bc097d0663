package expiration

import (
	"context"
	"time"
)

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
