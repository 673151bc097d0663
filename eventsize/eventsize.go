// Package eventsize tells whether an event will be within the size limit of the specification when it is built again later. The event may
// grow until then: it may refer to more events, and its depth may be greater.
package eventsize

import "github.com/matrix-org/gomatrixserverlib"

const (
	// Max is the limit of the specification, in bytes, for an event as it is federated.
	Max = 65536
	// MaxPrevEvents and MaxAuthEvents are how many prev events and auth events an event that Dendrite builds has at most.
	MaxPrevEvents = 20
	MaxAuthEvents = 10
	// maxDepthDigits is how many digits the depth of an event can have.
	maxDepthDigits = 19
	// The size of a reference to an event, with its comma. From room version 3 on, it is a quoted hash. Before that, it is an event ID of
	// up to 255 bytes with the event's hash beside it.
	referenceSize    = len(`"$0123456789012345678901234567890123456789012",`)
	oldReferenceSize = len(`["",{"sha256":"0123456789012345678901234567890123456789012"}],`) + 255
)

// Fits reports whether an event is sure to have at most Max bytes, however many events it refers to when it is built. The event is like e,
// but with content of contentSize bytes.
func Fits(e gomatrixserverlib.PDU, contentSize int) bool {
	reference := referenceSize
	switch e.Version() {
	case gomatrixserverlib.RoomVersionV1, gomatrixserverlib.RoomVersionV2:
		reference = oldReferenceSize
	}
	more := max(MaxPrevEvents-len(e.PrevEventIDs()), 0) + max(MaxAuthEvents-len(e.AuthEventIDs()), 0)
	return len(e.JSON())-len(e.Content())+contentSize+more*reference+maxDepthDigits <= Max
}
