// Package eventsize says whether an event will fit into the limit of the specification once it is built again: its
// references to other events can be more and longer then, and its depth greater.
package eventsize

import "github.com/matrix-org/gomatrixserverlib"

const (
	// Max is the limit of the specification, in bytes, for an event as it is federated.
	Max = 65536
	// MaxPrevEvents and MaxAuthEvents are how many events Dendrite refers to at most when it builds one.
	MaxPrevEvents = 20
	MaxAuthEvents = 10
	// maxDepthDigits is how many digits the depth of an event can have.
	maxDepthDigits = 19
	// A reference to an event, comma included: from room version 3 on a quoted hash, before that any event ID with the
	// event's hash beside it.
	referenceSize    = len(`"$0123456789012345678901234567890123456789012",`)
	oldReferenceSize = len(`["",{"sha256":"0123456789012345678901234567890123456789012"}],`) + 255
)

// Fits reports whether an event with content of so many bytes, and else like e, is sure to be within Max, however many
// events it will have to refer to when it is built.
func Fits(e gomatrixserverlib.PDU, contentSize int) bool {
	reference := referenceSize
	switch e.Version() {
	case gomatrixserverlib.RoomVersionV1, gomatrixserverlib.RoomVersionV2:
		reference = oldReferenceSize
	}
	more := max(MaxPrevEvents-len(e.PrevEventIDs()), 0) + max(MaxAuthEvents-len(e.AuthEventIDs()), 0)
	return len(e.JSON())-len(e.Content())+contentSize+more*reference+maxDepthDigits <= Max
}
