package rtc

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

var carolBody = with(aliceBody, JSON{"user_id": "@carol:b.example", "member_id": "xyz"})

// A user of another server gets a token with which she can only listen, unless her server has full access.
func TestGetTokenForAnotherServer(t *testing.T) {
	for _, path := range paths {
		for _, publish := range []bool{false, true} {
			w := newWorld(t, func(w *world) {
				if publish {
					w.cfg.FullAccessServers = []string{"b.example"}
				}
			})
			a := w.askAs("b.example", path, carolBody)
			require.Equal(t, http.StatusOK, a.Code, a.Body)
			identity := livekit.Identity("@carol:b.example", "xyz")
			require.Equal(t, tokenFor(publish, roomID, identity), a.Get("jwt").Str)
			require.Equal(t, "@carol:b.example", w.keeper.remembered[0].UserID)
		}
	}
}

func TestGetTokenForAnotherServerErrors(t *testing.T) {
	w := newWorld(t, nil)
	for name, test := range faults {
		if changes, ok := test.body.(JSON); ok {
			t.Run(name, func(t *testing.T) {
				refused(t, w.askAs("b.example", paths[0], with(carolBody, changes)), http.StatusBadRequest, test.errcode)
			})
		}
	}
	for name, test := range map[string]struct {
		origin  spec.ServerName
		changes JSON
		status  int
		errcode string
	}{
		"NoUser":           {"b.example", JSON{"user_id": nil}, http.StatusBadRequest, "M_MISSING_PARAM"},
		"UserIsNumber":     {"b.example", JSON{"user_id": 5}, http.StatusBadRequest, "M_BAD_JSON"},
		"OurUser":          {"b.example", JSON{"user_id": "@alice:a.example"}, http.StatusForbidden, "M_FORBIDDEN"},
		"UserOfAThird":     {"c.example", JSON{}, http.StatusForbidden, "M_FORBIDDEN"},
		"MalformedUser":    {"b.example", JSON{"user_id": "carol:b.example"}, http.StatusForbidden, "M_FORBIDDEN"},
		"NotJoined":        {"b.example", JSON{"user_id": "@erin:b.example"}, http.StatusForbidden, "M_FORBIDDEN"},
		"NotJoinedFirst":   {"b.example", JSON{"user_id": "@erin:b.example", "url": otherSFU}, http.StatusForbidden, "M_FORBIDDEN"},
		"RoomWithoutUs":    {"b.example", JSON{"room_id": "!left:b.example"}, http.StatusForbidden, "M_FORBIDDEN"},
		"BannedByACL":      {"b.example", JSON{"room_id": "!acl:a.example"}, http.StatusForbidden, "M_FORBIDDEN"},
		"WrongSignature":   {"evil.example", JSON{"user_id": "@mallory:evil.example"}, http.StatusUnauthorized, ""},
		"ServerNameIsNone": {"b.example", JSON{"server_name": "c.example", "url": otherSFU}, http.StatusBadRequest, "M_INVALID_PARAM"},
	} {
		t.Run(name, func(t *testing.T) {
			refused(t, w.askAs(test.origin, paths[0], with(carolBody, test.changes)), test.status, test.errcode)
		})
	}
	unsigned := httptest.NewRequest(http.MethodPost, "/_matrix/federation"+paths[0], strings.NewReader(string(encode(t, carolBody))))
	unsigned.Header.Set("Content-Type", "application/json")
	require.Equal(t, http.StatusUnauthorized, w.serve(w.routers.Federation, unsigned).Code)
	require.Empty(t, w.sfu.rooms)
	require.Empty(t, w.servers.asked, "a server that asks makes us ask nobody")
}
