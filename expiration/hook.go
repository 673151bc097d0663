package expiration

import "context"

// Built is an event that Dendrite has built and signed for this server, and not yet given to the roomserver.
type Built struct {
	EventID     string
	RoomID      string
	Type        string
	StateKey    *string
	RoomVersion string
	PDU         []byte
	// Closable reports whether the event's closing event is sure to fit into an event.
	Closable bool
}

// Signed returns the event as it is given to the roomserver again, should that be necessary.
func (b Built) Signed() SignedEvent {
	return SignedEvent{EventID: b.EventID, RoomVersion: b.RoomVersion, PDU: b.PDU}
}

// Hook sees one event between the moment in which Dendrite has built it and the moment in which the roomserver gets it. Dendrite's
// SendEvent builds and sends in one go; the hook is called by the roomserver API that is given to it as a parameter, see
// roomserver.API.Hooked.
type Hook struct {
	// Before is called with the event. If it fails, the event does not reach the roomserver, and the error stands in Err.
	Before func(ctx context.Context, b Built) error
	// After is called when the roomserver has answered, if Before was called and succeeded. sent is false if the event may
	// not be in its room. It may be nil.
	After func(ctx context.Context, sent bool)
	// Called reports whether Before was called, and Err how it failed. Both may be read when SendEvent has returned.
	Called bool
	Err    error
}
