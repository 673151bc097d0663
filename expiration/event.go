package expiration

import (
	"strings"

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
