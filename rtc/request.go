package rtc

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

const (
	// maxBody bounds a request's body, and an answer of another server, in bytes.
	maxBody = 16 << 10
	// bodyTimeout is how long a body may take to arrive.
	bodyTimeout = 10 * time.Second
	// maxName bounds each name in a request, in bytes. It is Matrix's limit for user IDs and state keys.
	maxName = 255
	// maxSecret bounds URLs and OpenID tokens, in bytes.
	maxSecret = 4 << 10
	// callSlot is the slot of a room's call. Clients that do not know slots mean it.
	callSlot = "m.call#ROOM"
)

// fields reads the fields of a request's body. After the first fault, which is err, it only returns zero values.
type fields struct {
	object gjson.Result
	// missing, wrong and invalid make the errors of a field that is not there, that has another type, and whose value is not allowed.
	missing, wrong, invalid func(msg string) spec.MatrixError
	err                     error
}

// matrixFields reads the body of a request of MSC4195.
func matrixFields(body []byte) *fields {
	return &fields{gjson.ParseBytes(body), spec.MissingParam, spec.BadJSON, spec.InvalidParam, webapi.CheckObject(body, "The body")}
}

// serviceFields reads the body of a request to the service, which has one error for all.
func serviceFields(body []byte) *fields {
	return &fields{gjson.ParseBytes(body), spec.BadJSON, spec.BadJSON, spec.BadJSON, webapi.CheckObject(body, "The body")}
}

// fail notes a fault, unless there is one already.
func (f *fields) fail(e spec.MatrixError) {
	if f.err == nil {
		f.err = webapi.BadRequest(e)
	}
}

// has reports whether a field is there, and is not null.
func (f *fields) has(path string) bool { return f.object.Get(path).Type != gjson.Null }

// name returns a name, which must be there.
func (f *fields) name(path string) string { return f.text(path, maxName) }

// optional returns a name that may be missing, or "".
func (f *fields) optional(path string) string {
	if !f.has(path) {
		return ""
	}
	return f.name(path)
}

// text returns a string of limited length, which must be there. PostgreSQL cannot look up a string with NUL.
func (f *fields) text(path string, limit int) string {
	field := f.object.Get(path)
	switch {
	case field.Type == gjson.Null, field.Type == gjson.String && field.Str == "":
		f.fail(f.missing(path + " is missing"))
	case field.Type != gjson.String:
		f.fail(f.wrong(path + " must be a string"))
	case len(field.Str) > limit:
		f.fail(f.invalid(fmt.Sprintf("%s must be at most %d bytes", path, limit)))
	case strings.ContainsRune(field.Str, 0):
		f.fail(f.invalid(path + " must not have a NUL"))
	default:
		return field.Str
	}
	return ""
}

// member returns the member of a slot who asks. The older form of a request has a device.
func (f *fields) member(userID string) member {
	m := member{userID: userID, roomID: f.name("room_id"), slotID: f.name("slot_id")}
	if f.has("member_id") || !f.has("member") {
		m.id = f.name("member_id")
	} else {
		m.id, m.deviceID = f.name("member.id"), f.name("member.claimed_device_id")
	}
	if m.isAmbiguous() {
		f.fail(errMemberID)
	}
	return m
}

// member is who wants to connect to an SFU: a member of a slot in a room.
type member struct {
	userID, roomID, slotID, id string
	// deviceID is part of the identity at the SFU, or "" in the newest form of a request.
	deviceID string
}

// participant returns the member's names at LiveKit. Clients derive the same, to know who is who.
func (m member) participant() livekit.Participant {
	room := livekit.RoomName(m.roomID, m.slotID)
	switch {
	case m.deviceID != "":
		return livekit.Participant{Room: room, Identity: livekit.Identity(m.userID, m.deviceID, m.id)}
	case m.isPlain(): // what Element Call has as member ID in calls whose members are state events
		return livekit.Participant{Room: room, Identity: m.id}
	}
	return livekit.Participant{Room: room, Identity: livekit.Identity(m.userID, m.id)}
}

// isPlain reports whether the member ID is the identity, as it is.
func (m member) isPlain() bool { return m.deviceID == "" && strings.HasPrefix(m.id, m.userID+":") }

// isAmbiguous reports whether the identity could be that of a user of another server: @al:x with the device 8448:D, and @al:x:8448 with D.
func (m member) isAmbiguous() bool {
	device := strings.TrimPrefix(m.id, m.userID+":")
	afterPort := strings.TrimLeft(device, "0123456789")
	return m.isPlain() && afterPort != device && strings.HasPrefix(afterPort, ":")
}

// key identifies the member, whatever the form of the request.
func (m member) key() [sha256.Size]byte {
	text, _ := json.Marshal([]string{m.userID, m.roomID, m.slotID, m.id}) // strings can always be marshalled
	return sha256.Sum256(text)
}
