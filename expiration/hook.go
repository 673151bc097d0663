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

// Hook sees one event between the moment in which Dendrite has built it and the moment in which the roomserver gets it.
//
// It exists because Dendrite's send function builds and sends in one go, and hands nothing in between but the request's
// context to the roomserver's interface. The hook travels in that context: whoever calls the send function puts it in
// with [WithHook], and the wrapper around the roomserver takes it out with [HookFrom]. That is the one coupling between
// the packages that no import shows.
type Hook struct {
	// Before is called with the event, once at the most. If it fails, the event does not reach the roomserver, and the
	// error stands in Err.
	Before func(ctx context.Context, b Built) error
	// After is called when the roomserver has answered, if Before was called and succeeded. sent is false if the event may
	// not be in its room.
	After func(ctx context.Context, sent bool)
	// Called reports whether Before was called, and Err how it failed. Both may be read when the send function has
	// returned.
	Called bool
	Err    error
}

type hookKey struct{}

// WithHook returns a context for one call of Dendrite's send function.
func WithHook(ctx context.Context, h *Hook) context.Context {
	return context.WithValue(ctx, hookKey{}, h)
}

// HookFrom returns the hook of the context, or nil.
func HookFrom(ctx context.Context) *Hook {
	h, _ := ctx.Value(hookKey{}).(*Hook)
	return h
}
