package clientapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"
	"unicode/utf8"

	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/matrix-org/util"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/dendritefix"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/eventsize"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/jsondepth"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/webapi"
)

const (
	// maxNameSize is the longest type or state key of an event, in bytes (the specification's limit).
	maxNameSize = 255
	// closingSize is how much larger the content of a closing event is than its original's, in bytes, without the original's ID.
	closingSize = len(`,"m.relates_to":{"event_id":"","rel_type":"m.expire.relationship"}`)
)

// checkNames returns an error if no event can have this room ID, type or state key. It is not called for a send with neither a delay nor
// m.will_expire: Dendrite checks that one.
func checkNames(to target) error {
	names := []struct{ what, value string }{{"room ID", to.roomID}, {"type", to.eventType}}
	if to.stateKey != nil {
		names = append(names, struct{ what, value string }{"state key", *to.stateKey})
	}
	for _, name := range names {
		// PostgreSQL can store neither invalid UTF-8 nor NUL, and JSON cannot express invalid UTF-8.
		if !utf8.ValidString(name.value) || strings.ContainsRune(name.value, 0) {
			return webapi.BadRequest(spec.InvalidParam(fmt.Sprintf("The %s must be valid UTF-8 without NUL characters", name.what)))
		}
	}
	if _, err := spec.NewRoomID(to.roomID); err != nil || len(to.roomID) > maxNameSize {
		return webapi.BadRequest(spec.InvalidParam(fmt.Sprintf("The room ID must look like !room:server, with at most %d bytes", maxNameSize)))
	}
	for _, name := range names[1:] {
		if len(name.value) > maxNameSize { // an ordinary send gets the same answer
			return webapi.Refuse(http.StatusRequestEntityTooLarge, spec.BadJSON(
				fmt.Sprintf("The %s must be at most %d bytes", name.what, maxNameSize),
			))
		}
	}
	return nil
}

// checkContent returns an error for content that a later stage, such as a database or a decoder, cannot process. Dendrite does not check
// this.
func checkContent(content []byte) error {
	if dendritefix.Unstorable(content) {
		return webapi.BadRequest(spec.BadJSON("redacts, and event_id and rel_type in m.relates_to, must not have NUL characters"))
	}
	if jsondepth.TooDeep(content) {
		return webapi.BadRequest(spec.BadJSON(fmt.Sprintf("The content must not be nested deeper than %d levels", jsondepth.Max)))
	}
	return nil
}

// checkSendable returns an error if an event can be sent in no room of this version, whatever the room's state is. The content is the one
// that the event is sent with. checkSendable also returns the event that was built in a rehearsal, which has the size of the real one.
func (a *API) checkSendable(
	ctx context.Context, device *userapi.Device, version gomatrixserverlib.RoomVersion, to target, content []byte, timestamp time.Time,
) (gomatrixserverlib.PDU, error) {
	implementation, err := gomatrixserverlib.GetRoomVersion(version)
	if err != nil {
		return nil, fmt.Errorf("looking up a room version: %w", err)
	}
	if to.eventType == spec.MRoomCreate { // Dendrite cannot build one here
		return nil, webapi.Refuse(http.StatusForbidden, spec.Forbidden(neverSendable[spec.MRoomCreate]))
	}
	if to.eventType == spec.MRoomRedaction && !dendritefix.RedactsInContent(version) { // SendEvent sets no redacts beside the content
		return nil, webapi.Refuse(http.StatusForbidden, spec.Forbidden(neverSendable[spec.MRoomRedaction]))
	}
	if err = checkShape(version, to, content); err != nil {
		return nil, err
	}
	if content, err = plainInvite(to, content); err != nil {
		return nil, err
	}
	res, built := rehearse(ctx, a.dendrite, device, implementation, to, content, timestamp)
	if built == nil {
		return nil, refusal(res, to.eventType)
	}
	return built, nil
}

// plainInvite replaces an invitation by a third party with a plain one of the same size. The rehearsal cannot make up the room's
// m.room.third_party_invite, whose key verifies a signature in the content. Content that no such state could allow is returned unchanged,
// and the rehearsal refuses it.
func plainInvite(to target, content []byte) ([]byte, error) {
	const key, otherKey = "third_party_invite", "third-party-invite"
	var member gomatrixserverlib.MemberContent
	if to.eventType != spec.MRoomMember || to.stateKey == nil || json.Unmarshal(content, &member) != nil ||
		member.Membership != spec.Invite || member.ThirdPartyInvite == nil {
		return content, nil
	}
	signed := member.ThirdPartyInvite.Signed
	if signed.MXID != *to.stateKey || signed.Token == "" || !hasSignature(signed.Signatures) {
		return content, nil
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(content, &fields); err != nil {
		return nil, err
	}
	fields[otherKey] = fields[key]
	delete(fields, key)
	return json.Marshal(fields)
}

// hasSignature reports whether there is a signature of a kind that is verified.
func hasSignature(signatures map[string]map[string]string) bool {
	for _, byKey := range signatures {
		for keyID := range byKey {
			if strings.HasPrefix(keyID, "ed25519") {
				return true
			}
		}
	}
	return false
}

// checkExpiring returns an error if an expiring event can never be sent. It checks only events on which Dendrite's SendEvent may fail with
// a server error. SendEvent refuses the others by itself.
func (a *API) checkExpiring(ctx context.Context, device *userapi.Device, to target, content []byte) error {
	if err := checkNames(to); err != nil {
		return err
	}
	version, err := a.rsAPI.QueryRoomVersionForRoom(ctx, to.roomID)
	if err != nil {
		return nil // Dendrite answers this
	}
	if _, special := neverSendable[to.eventType]; !special && version != gomatrixserverlib.RoomVersionPseudoIDs {
		return nil // Dendrite looks at neither the content nor the state key of other types
	}
	_, err = a.checkSendable(ctx, device, version, to, content, time.Time{})
	return err
}

// checkSize returns an error if a rehearsed event might be too large when it is built for its real room. If closed is set, it checks the
// event's closing event instead, which is larger.
func checkSize(built gomatrixserverlib.PDU, to target, closed bool) error {
	size := len(built.Content()) + len(to.roomID) - len(built.RoomID().String())
	if closed {
		size += closingSize + len(built.EventID())
	}
	if eventsize.Fits(built, size) {
		return nil
	}
	return webapi.Refuse(http.StatusRequestEntityTooLarge, spec.BadJSON(fmt.Sprintf(
		"The event must be at most %d bytes with what the server adds to it", eventsize.Max,
	)))
}

// checkShape returns an error for events that SendEvent accepts but the roomserver cannot process.
func checkShape(version gomatrixserverlib.RoomVersion, to target, content []byte) error {
	switch to.eventType {
	case spec.MRoomMember:
		var member gomatrixserverlib.MemberContent
		switch pseudo := version == gomatrixserverlib.RoomVersionPseudoIDs; {
		case json.Unmarshal(content, &member) != nil:
			return webapi.BadRequest(spec.BadJSON(neverSendable[spec.MRoomMember]))
		case pseudo && member.MXIDMapping != nil:
			return webapi.BadRequest(spec.BadJSON("In this room the server sets mxid_mapping"))
		case pseudo && member.Membership == spec.Invite:
			return webapi.Refuse(http.StatusForbidden, spec.Forbidden("In this room an invitation cannot be sent as state"))
		case pseudo && to.stateKey != nil && strings.HasPrefix(*to.stateKey, "@"): // it is translated to the user's key in the room
			if _, err := spec.NewUserID(*to.stateKey, true); err != nil {
				return webapi.BadRequest(spec.InvalidParam("The state key of m.room.member must be a user ID"))
			}
		}
	case "m.room.tombstone":
		if lastField(content, "replacement_room").Str == to.roomID {
			return webapi.BadRequest(spec.InvalidParam("replacement_room must not be the room itself"))
		}
	}
	return nil
}

// refusal returns the error for an event of a type that SendEvent refused in a rehearsal.
func refusal(res util.JSONResponse, eventType string) error {
	body, err := json.Marshal(res.JSON)
	if err != nil {
		return err
	}
	hint := neverSendable[eventType]
	switch {
	case res.Code >= 500: // the event's fault, because a rehearsal asks no database; it may have been a panic
		if hint == "" {
			hint = "No room can have an event with this type, state key and content"
		}
		return webapi.BadRequest(spec.BadJSON(hint))
	case res.Code < 400:
		return errors.New("a rehearsed event was neither built nor refused")
	}
	text := gjson.GetBytes(body, "error").Str
	if hint != "" {
		text = strings.TrimSpace(hint + ": " + text)
	}
	return webapi.Refuse(res.Code, spec.MatrixError{
		ErrCode: spec.MatrixErrorCode(gjson.GetBytes(body, "errcode").Str), Err: text,
	})
}

// neverSendable has, by event type, a hint for the client whose event is refused whatever the room's state is. It says which values the
// fields must have.
var neverSendable = map[string]string{
	spec.MRoomCreate: "m.room.create is the first event of a room and cannot be sent later",
	spec.MRoomMember: "m.room.member needs membership to be one of join, invite, leave, ban and knock, the strings and objects" +
		" of the specification in its other fields, and a user ID as the state key",
	spec.MRoomPowerLevels: "m.room.power_levels needs objects from IDs to integers in users, events and notifications, and" +
		" integers in its other fields",
	spec.MRoomCanonicalAlias: "m.room.canonical_alias needs room aliases, as a string in alias and as an array in alt_aliases",
	spec.MRoomAliases:        "m.room.aliases needs the server's name as the state key",
	spec.MRoomRedaction:      "m.room.redaction cannot be sent this way in this version of rooms",
}
