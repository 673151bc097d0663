package rtc

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/limits"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

var aliceBody = JSON{"url": sfuURL, "room_id": roomID, "slot_id": slotID, "member_id": "abc"}

// A user who is joined gets a token for this server's own SFU on both paths, and may publish. The room is made, and the user remembered.
func TestGetToken(t *testing.T) {
	for name, more := range map[string]JSON{
		"NoServer": {}, "OurServer": {"server_name": "a.example"}, "Slash": {"url": sfuURL + "/"}, "MoreFields": {"user_id": "@bob:a.example", "x": 1},
	} {
		t.Run(name, func(t *testing.T) {
			for _, path := range paths {
				w := newWorld(t, nil)
				a := w.ask(path, "@alice:a.example", with(aliceBody, more))
				identity := livekit.Identity("@alice:a.example", "abc")
				require.JSONEq(t, `{"jwt":"`+tokenFor(true, roomID, identity)+`"}`, a.Body.String())
				require.Equal(t, http.StatusOK, a.Code)
				p := livekit.Participant{Room: livekit.RoomName(roomID, slotID), Identity: identity}
				require.Equal(t, []Participant{{p, roomID, "@alice:a.example"}}, w.keeper.remembered)
				require.Empty(t, w.servers.asked)
			}
		})
	}
	nobody := newWorld(t, func(w *world) { w.parts.Participants = nil })
	require.Equal(t, http.StatusOK, nobody.ask(paths[0], "@alice:a.example", aliceBody).Code)
}

// faults are bodies with which neither users nor servers get a token, and the errors.
var faults = map[string]struct {
	body    any
	errcode string
}{
	"NotJSON":         {`{"url":`, "M_NOT_JSON"},
	"NotUTF8":         {"{\"url\":\"\xff\"}", "M_NOT_JSON"},
	"Empty":           {``, "M_NOT_JSON"},
	"NoObject":        {`[]`, "M_BAD_JSON"},
	"NoURL":           {JSON{"url": nil}, "M_MISSING_PARAM"},
	"NoRoom":          {JSON{"room_id": nil}, "M_MISSING_PARAM"},
	"EmptyRoom":       {JSON{"room_id": ""}, "M_MISSING_PARAM"},
	"NoSlot":          {JSON{"slot_id": nil}, "M_MISSING_PARAM"},
	"NoMember":        {JSON{"member_id": nil}, "M_MISSING_PARAM"},
	"NoMemberID":      {JSON{"member_id": nil, "member": JSON{"claimed_device_id": "DEV"}}, "M_MISSING_PARAM"},
	"NoDevice":        {JSON{"member_id": nil, "member": JSON{"id": "abc"}}, "M_MISSING_PARAM"},
	"URLIsNumber":     {JSON{"url": 5}, "M_BAD_JSON"},
	"RoomIsObject":    {JSON{"room_id": JSON{}}, "M_BAD_JSON"},
	"MemberIDIsArray": {JSON{"member_id": []string{"a"}}, "M_BAD_JSON"},
	"LongSlot":        {JSON{"slot_id": strings.Repeat("x", 256)}, "M_INVALID_PARAM"},
	"NUL":             {JSON{"room_id": "!a\x00:a.example"}, "M_INVALID_PARAM"},
	"NotOurs":         {JSON{"url": otherSFU}, "M_INVALID_PARAM"},
}

func TestGetTokenErrors(t *testing.T) {
	w := newWorld(t, nil)
	for name, test := range faults {
		t.Run(name, func(t *testing.T) {
			body := test.body
			if changes, ok := body.(JSON); ok {
				body = with(aliceBody, changes)
			}
			refused(t, w.ask(paths[0], "@alice:a.example", body), http.StatusBadRequest, test.errcode)
		})
	}
	for name, test := range map[string]struct {
		user    string
		changes JSON
		status  int
		errcode string
	}{
		"NoToken":        {"", JSON{}, http.StatusUnauthorized, "M_MISSING_TOKEN"},
		"NotJoined":      {"@erin:a.example", JSON{}, http.StatusForbidden, "M_FORBIDDEN"},
		"NotJoinedFirst": {"@erin:a.example", JSON{"url": "wss://x", "server_name": "b.example"}, http.StatusForbidden, "M_FORBIDDEN"},
		"UnknownRoom":    {"@alice:a.example", JSON{"room_id": "!unknown:a.example"}, http.StatusForbidden, "M_FORBIDDEN"},
		"MalformedRoom":  {"@alice:a.example", JSON{"room_id": "room"}, http.StatusForbidden, "M_FORBIDDEN"},
		"OursButNotURL":  {"@alice:a.example", JSON{"server_name": "a.example", "url": otherSFU}, http.StatusBadRequest, "M_INVALID_PARAM"},
		"ServerIsNumber": {"@alice:a.example", JSON{"server_name": 5}, http.StatusBadRequest, "M_BAD_JSON"},
		"AnothersDevice": {"@alice:a.example", JSON{"member_id": "@alice:a.example:8448:DEV"}, http.StatusBadRequest, "M_INVALID_PARAM"},
	} {
		t.Run(name, func(t *testing.T) {
			refused(t, w.ask(paths[0], test.user, with(aliceBody, test.changes)), test.status, test.errcode)
		})
	}
	require.Empty(t, w.sfu.rooms, "nothing was made")
	require.Empty(t, w.keeper.remembered)
	require.Empty(t, w.servers.asked)
}

// The answer to a user who is not joined is the same for every room, on both APIs.
func TestNothingTellsOfRooms(t *testing.T) {
	w := newWorld(t, nil)
	one := w.ask(paths[0], "@erin:a.example", aliceBody).Body.String()
	for _, room := range []string{"!unknown:a.example", "!left:b.example", "room", "!"} {
		require.Equal(t, one, w.ask(paths[0], "@erin:a.example", with(aliceBody, JSON{"room_id": room})).Body.String(), room)
		body := with(aliceBody, JSON{"room_id": room, "user_id": "@carol:b.example"})
		require.Equal(t, one, w.askAs("b.example", paths[0], body).Body.String(), room)
	}
}

// A fault of the server or of LiveKit is no answer about the request. Nobody gets a token who is not remembered.
func TestGetTokenWithoutLiveKit(t *testing.T) {
	for name, test := range map[string]struct {
		change  func(*world)
		status  int
		errcode string
	}{
		"LiveKitAway":    {func(w *world) { w.sfu.err = errAway }, http.StatusInternalServerError, "M_UNKNOWN"},
		"RoomserverAway": {func(w *world) { w.rooms.err = errAway }, http.StatusInternalServerError, "M_UNKNOWN"},
		"DatabaseAway":   {func(w *world) { w.keeper.err = errAway }, http.StatusInternalServerError, "M_UNKNOWN"},
		"LeftMeanwhile":  {func(w *world) { w.keeper.err = ErrNotJoined }, http.StatusForbidden, "M_FORBIDDEN"},
		"TooMany":        {func(w *world) { w.keeper.err = ErrTooMany }, http.StatusTooManyRequests, "M_LIMIT_EXCEEDED"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, test.change)
			refused(t, w.ask(paths[0], "@alice:a.example", aliceBody), test.status, test.errcode)
			refused(t, w.askAs("b.example", paths[0], carolBody), test.status, test.errcode)
		})
	}
}

// Each user, each other server, and each address may ask only so often.
func TestTokensAreLimited(t *testing.T) {
	once := limits.Rate{Threshold: 1, Cooloff: time.Hour}
	w := newWorld(t, func(w *world) { w.cfg.UserRequests, w.cfg.ServerRequests = once, once })
	for i, want := range []int{http.StatusOK, http.StatusTooManyRequests} {
		require.Equal(t, want, w.ask(paths[i], "@alice:a.example", aliceBody).Code)
		require.Equal(t, want, w.ask(paths[i], "@bob:a.example", aliceBody).Code)
		require.Equal(t, want, w.askAs("b.example", paths[i], carolBody).Code)
		require.Equal(t, want, w.askAs("c.example", paths[i], with(carolBody, JSON{"user_id": "@dave:c.example"})).Code)
		require.Equal(t, want, w.askService("/get_token", serviceBody).Code)
	}
	refused(t, w.askService("/sfu/get", JSON{}), http.StatusTooManyRequests, "M_LIMIT_EXCEEDED")
}

// A body that is too large is refused.
func TestLargeBodies(t *testing.T) {
	w := newWorld(t, nil)
	large := with(aliceBody, JSON{"x": strings.Repeat("x", maxBody)})
	require.Equal(t, http.StatusRequestEntityTooLarge, w.ask(paths[0], "@alice:a.example", large).Code)
	require.Equal(t, http.StatusRequestEntityTooLarge, w.askService("/sfu/get", large).Code)
	require.Equal(t, http.StatusBadRequest, w.askAs("b.example", paths[0], with(carolBody, large)).Code)
}
