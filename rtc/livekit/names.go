package livekit

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"

	"github.com/matrix-org/gomatrixserverlib"
)

// RoomName returns LiveKit's name for the room of a slot (MSC4195). The name hides the Matrix room and the slot. It has no salt, so every
// server and every client that knows both derives the same name.
func RoomName(roomID, slotID string) string { return hash(roomID, slotID) }

// Identity returns LiveKit's name for a member of a slot (MSC4195). The parts are the user ID and the member ID, or the user ID, the device
// ID and the member ID in older texts. Clients derive the identity too, so a token must have the parts that its client uses.
func Identity(parts ...string) string { return hash(parts...) }

// hash returns the unpadded base64 of the SHA-256 of the parts as a canonical JSON array. Invalid UTF-8 becomes U+FFFD.
func hash(parts ...string) string {
	text, _ := json.Marshal(parts) // strings can always be marshalled
	// Canonical JSON has <, >, &, U+2028 and U+2029 as they are. The encoder of encoding/json escapes them.
	sum := sha256.Sum256(gomatrixserverlib.CanonicalJSONAssumeValid(text))
	return base64.RawStdEncoding.EncodeToString(sum[:])
}
