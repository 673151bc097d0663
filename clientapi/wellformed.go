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
)

const (
	// maxNameSize is the longest type or state key of an event, in bytes (the specification's limit).
	maxNameSize = 255
	// closingSize is what the content of a closing event has more than its original's, in bytes, but for the original's ID.
	closingSize = len(`,"m.relates_to":{"event_id":"","rel_type":"m.expire.relationship"}`)
)

// checkNames returns an error if the room ID, type or state key of an event are such that no event can have them. A message
// that is sent without delay and life time is left to Dendrite.
func checkNames(to target) error {
	names := []struct{ what, value string }{{"room ID", to.roomID}, {"type", to.eventType}}
	if to.stateKey != nil {
		names = append(names, struct{ what, value string }{"state key", *to.stateKey})
	}
	for _, name := range names {
		// PostgreSQL stores neither, and JSON cannot say what is not UTF-8.
		if !utf8.ValidString(name.value) || strings.ContainsRune(name.value, 0) {
			return badRequest(spec.InvalidParam(fmt.Sprintf("The %s must be valid UTF-8 without NUL characters", name.what)))
		}
	}
	if _, err := spec.NewRoomID(to.roomID); err != nil || len(to.roomID) > maxNameSize {
		return badRequest(spec.InvalidParam(fmt.Sprintf("The room ID must look like !room:server, with at most %d bytes", maxNameSize)))
	}
	for _, name := range names[1:] {
		if len(name.value) > maxNameSize { // an ordinary send is answered with the same
			return &requestError{http.StatusRequestEntityTooLarge, spec.BadJSON(
				fmt.Sprintf("The %s must be at most %d bytes", name.what, maxNameSize),
			)}
		}
	}
	return nil
}

// checkContent returns an error if content cannot be carried through all that comes after us, which Dendrite does not see.
func checkContent(content []byte) error {
	if dendritefix.Unstorable(content) {
		return badRequest(spec.BadJSON("redacts, and event_id and rel_type in m.relates_to, must not have NUL characters"))
	}
	if jsondepth.TooDeep(content) {
		return badRequest(spec.BadJSON(fmt.Sprintf("The content must not be nested deeper than %d levels", jsondepth.Max)))
	}
	return nil
}

// checkSendable returns an error if no state of a room with this version could make an event sendable. The content is as the
// event has it when it is sent. The event that Dendrite made of it in a room of its own is returned too, or nil if another
// state is needed for that.
func (a *API) checkSendable(
	ctx context.Context, device *userapi.Device, version gomatrixserverlib.RoomVersion, to target, content []byte, timestamp time.Time,
) (gomatrixserverlib.PDU, error) {
	implementation, err := gomatrixserverlib.GetRoomVersion(version)
	if err != nil {
		return nil, fmt.Errorf("looking up a room version: %w", err)
	}
	if to.eventType == spec.MRoomCreate { // Dendrite fails to build one
		return nil, &requestError{http.StatusForbidden, spec.Forbidden(neverSendable[spec.MRoomCreate])}
	}
	if err = checkShape(version, to, content); err != nil {
		return nil, err
	}
	res, built := rehearse(ctx, a.dendrite, device, implementation, to, content, timestamp)
	if built == nil {
		return nil, refusal(res, to, content)
	}
	return built, nil
}

// checkExpiring returns an error if nothing could make an expiring event sendable, so far as an ordinary send does not say
// the same: that is all but what makes Dendrite fail.
func (a *API) checkExpiring(ctx context.Context, device *userapi.Device, to target, content []byte) error {
	if err := checkNames(to); err != nil {
		return err
	}
	version, err := a.rsAPI.QueryRoomVersionForRoom(ctx, to.roomID)
	if err != nil {
		return nil // which Dendrite answers
	}
	if _, special := neverSendable[to.eventType]; !special && version != gomatrixserverlib.RoomVersionPseudoIDs {
		return nil // Dendrite does not look at the content of other types, nor at their state keys
	}
	_, err = a.checkSendable(ctx, device, version, to, content, time.Time{})
	return err
}

// checkSize returns an error if a rehearsed event, or its closing event if it is to have one, might be too large when it is
// built for its room.
func checkSize(built gomatrixserverlib.PDU, to target, closed bool) error {
	size := len(built.Content()) + len(to.roomID) - len(built.RoomID().String())
	if closed {
		size += closingSize + len(built.EventID())
	}
	if eventsize.Fits(built, size) {
		return nil
	}
	return &requestError{http.StatusRequestEntityTooLarge, spec.BadJSON(fmt.Sprintf(
		"The event must be at most %d bytes with what the server adds to it", eventsize.Max,
	))}
}

// checkShape returns an error for what SendEvent accepts and the roomserver cannot work with.
func checkShape(version gomatrixserverlib.RoomVersion, to target, content []byte) error {
	switch to.eventType {
	case spec.MRoomMember:
		// In rooms with pseudo IDs a key may stand there; a user ID is translated.
		if to.stateKey == nil || version == gomatrixserverlib.RoomVersionPseudoIDs && !strings.HasPrefix(*to.stateKey, "@") {
			return nil
		}
		if _, err := spec.NewUserID(*to.stateKey, true); err != nil {
			return badRequest(spec.InvalidParam("The state key of m.room.member must be a user ID"))
		}
	case "m.room.tombstone":
		if gjson.GetBytes(content, "replacement_room").Str == to.roomID {
			return badRequest(spec.InvalidParam("replacement_room must not be the room itself"))
		}
	}
	return nil
}

// refusal returns the error for an event that SendEvent refuses in a room in which its sender may do everything, or nil if
// another state might make it sendable after all.
func refusal(res util.JSONResponse, to target, content []byte) error {
	body, err := json.Marshal(res.JSON)
	if err != nil {
		return err
	}
	hint := neverSendable[to.eventType]
	var member gomatrixserverlib.MemberContent
	switch {
	case res.Code >= 500: // for which no fault of the server's can be the reason; it may be a panic
		if hint == "" {
			hint = "No room can have an event with this type, state key and content"
		}
		return badRequest(spec.BadJSON(hint))
	case res.Code < 400:
		return errors.New("a rehearsed event was neither built nor refused")
	case res.Code == http.StatusForbidden && to.eventType == spec.MRoomMember &&
		json.Unmarshal(content, &member) == nil && member.ThirdPartyInvite != nil:
		return nil // the room must have the invitation
	}
	text := gjson.GetBytes(body, "error").Str
	if hint != "" {
		text = strings.TrimSpace(hint + ": " + text)
	}
	return &requestError{res.Code, spec.MatrixError{
		ErrCode: spec.MatrixErrorCode(gjson.GetBytes(body, "errcode").Str), Err: text,
	}}
}

// neverSendable says what is wrong with an event that is refused whatever the room's state: which field must have which
// values.
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
