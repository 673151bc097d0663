package expiration

import "context"

// Built is an event that Dendrite has built and signed for this server. The roomserver does not have it yet.
type Built struct {
	EventID     string
	RoomID      string
	Type        string
	StateKey    *string
	RoomVersion string
	PDU         []byte
	// Closable reports whether the event's closing event certainly fits into an event.
	Closable bool
}

// Signed returns the event in the form in which it can be given to the roomserver again.
func (b Built) Signed() SignedEvent {
	return SignedEvent{EventID: b.EventID, RoomVersion: b.RoomVersion, PDU: b.PDU}
}

// Hook sees one event after Dendrite has built it and before the roomserver gets it. Dendrite's SendEvent builds and sends in one call, so
// the hook is called by the roomserver API that SendEvent gets as a parameter, see roomserver.API.Hooked. Hook is in this package because
// clientapi makes hooks and roomserver calls them, and neither imports the other.
type Hook struct {
	// Before is called with the event. If it fails, the event does not reach the roomserver, and Err is set.
	Before func(ctx context.Context, b Built) error
	// After is called when the roomserver has answered, if Before succeeded. sent is false if the event may not be in its room. After may
	// be nil.
	After func(ctx context.Context, sent bool)
	// Called reports whether Before was called, and Err is its error. Both may be read after SendEvent has returned.
	Called bool
	Err    error
}
