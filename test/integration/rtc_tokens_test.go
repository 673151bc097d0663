package integration

import (
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/fakelivekit"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

const (
	slotID      = "m.call#ROOM"
	servicePath = "/_matrix/client/unstable/io.element.msc4195/livekit"
)

// getTokenPaths are the paths of get_token for clients.
var getTokenPaths = tokenPathsEndingIn("/rtc/livekit/get_token")

func tokenPathsEndingIn(suffix string) (paths []string) {
	for _, path := range tokenPaths {
		if strings.HasPrefix(path, "/_matrix/client") && strings.HasSuffix(path, suffix) {
			paths = append(paths, path)
		}
	}
	return paths
}

// openID returns an OpenID token of the user, in the answer's own form.
func (u *user) openID(t *testing.T) JSON {
	t.Helper()
	res := u.must(t, http.MethodPost, "/_matrix/client/v3/user/"+url.PathEscape(u.UserID)+"/openid/request_token", JSON{})
	openID, ok := res.Get("@this").Value().(JSON)
	require.True(t, ok, res)
	return openID
}

// requireRefused requires an error that a browser can read.
func requireRefused(t *testing.T, res homeserver.Response, status int, errcode string) {
	t.Helper()
	require.Equal(t, status, res.Code, res)
	require.Equal(t, errcode, res.Get("errcode").Str, res)
	require.Equal(t, "*", res.Header.Get("Access-Control-Allow-Origin"))
}

// requireToken requires a token that LiveKit accepts, and that is for this participant of the room's call.
func requireToken(t *testing.T, res homeserver.Response, roomID, identity string, publish bool) {
	t.Helper()
	require.Equal(t, http.StatusOK, res.Code, res)
	claims, err := fakelivekit.Verify(res.Get("jwt").Str)
	require.NoError(t, err, res)
	require.Equal(t, identity, claims.Subject)
	require.Equal(t, livekit.RoomName(roomID, slotID), claims.Video.Room)
	require.True(t, claims.Video.RoomJoin)
	require.True(t, *claims.Video.CanSubscribe)
	require.Equal(t, publish, *claims.Video.CanPublish)
	require.Equal(t, publish, *claims.Video.CanPublishData)
	require.False(t, claims.Video.RoomAdmin || claims.Video.RoomCreate || claims.Video.RoomList)
}

// startLiveKit starts a LiveKit for one test.
func startLiveKit(t *testing.T) *fakelivekit.Server {
	liveKit := fakelivekit.Start()
	t.Cleanup(liveKit.Close)
	return liveKit
}

// A server with LiveKit gives its users tokens, on its own API and on that of the service. It does not federate. No token and no secret gets
// into the log, although all is logged.
func TestTokens(t *testing.T) {
	t.Parallel()
	const sfu = "ws://127.0.0.1:1/sfu"
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			liveKit := startLiveKit(t)
			s := start(t, homeserver.Config{
				Postgres: db.open(t), WellKnown: true, Expiration: unlimited, MatrixRTC: JSON{"livekit": liveKit.Section(sfu)},
			})
			alice, bob := s.newUser(t), s.newUser(t)
			guest, err := s.RegisterGuest(t.Context())
			require.NoError(t, err)
			roomID, empty := s.room(t, alice), s.room(t, bob)
			body := func(room string) JSON {
				return JSON{"url": sfu, "room_id": room, "slot_id": slotID, "member_id": "abc"}
			}
			for _, path := range getTokenPaths {
				res := alice.do(t, http.MethodPost, path, body(roomID))
				requireToken(t, res, roomID, livekit.Identity(alice.UserID, "abc"), true)
				require.Equal(t, []string{livekit.RoomName(roomID, slotID)}, liveKit.Rooms())

				// Nothing tells a room without the user from a room that does not exist.
				requireRefused(t, alice.do(t, http.MethodPost, path, body(empty)), http.StatusForbidden, "M_FORBIDDEN")
				unknown := alice.do(t, http.MethodPost, path, body("!unknown:localhost"))
				require.Equal(t, alice.do(t, http.MethodPost, path, body(empty)).Body, unknown.Body)
				requireRefused(t, (&user{guest, s}).do(t, http.MethodPost, path, body(roomID)), http.StatusForbidden, "M_FORBIDDEN")
				requireRefused(t, (&user{s.Anonymous(), s}).do(t, http.MethodPost, path, body(roomID)), http.StatusUnauthorized, "M_MISSING_TOKEN")
				requireRefused(t, alice.do(t, http.MethodGet, path, nil), http.StatusMethodNotAllowed, "M_UNRECOGNIZED")
				other := body(roomID)
				other["url"] = "wss://elsewhere.example"
				requireRefused(t, alice.do(t, http.MethodPost, path, other), http.StatusBadRequest, "M_INVALID_PARAM")
				other["server_name"] = "elsewhere.example"
				requireRefused(t, alice.do(t, http.MethodPost, path, other), http.StatusForbidden, "M_FORBIDDEN")
			}

			browser := &user{s.Anonymous(), s}
			openID := alice.openID(t)
			ask := func(path string, body any) homeserver.Response {
				return browser.do(t, http.MethodPost, servicePath+path, body)
			}
			sfuGet := JSON{"room": roomID, "openid_token": openID, "device_id": "DEV"}
			res := ask("/sfu/get", sfuGet)
			requireToken(t, res, roomID, alice.UserID+":DEV", true)
			require.Equal(t, sfu, res.Get("url").Str)
			member := JSON{"id": "abc", "claimed_user_id": alice.UserID, "claimed_device_id": "DEV"}
			res = ask("/get_token", JSON{"room_id": roomID, "slot_id": slotID, "openid_token": openID, "member": member})
			requireToken(t, res, roomID, livekit.Identity(alice.UserID, "DEV", "abc"), true)
			requireRefused(t, ask("/sfu/get", JSON{"room": roomID, "openid_token": bob.openID(t), "device_id": "DEV"}), http.StatusForbidden, "M_FORBIDDEN")
			wrong := JSON{"access_token": "wrong", "matrix_server_name": s.Name}
			requireRefused(t, ask("/sfu/get", JSON{"room": roomID, "openid_token": wrong, "device_id": "DEV"}), http.StatusUnauthorized, "M_UNAUTHORIZED")
			requireRefused(t, ask("/sfu/get", []byte("{")), http.StatusBadRequest, "M_NOT_JSON")

			liveKit.SetAway(true)
			requireRefused(t, ask("/sfu/get", sfuGet), http.StatusInternalServerError, "M_UNKNOWN")
			requireRefused(t, alice.do(t, http.MethodPost, getTokenPaths[0], body(roomID)), http.StatusInternalServerError, "M_UNKNOWN")
			liveKit.SetAway(false)
			liveKit.Forget()
			requireToken(t, ask("/sfu/get", sfuGet), roomID, alice.UserID+":DEV", true)

			alice.must(t, http.MethodPost, "/_matrix/client/v3/rooms/"+roomID+"/leave", JSON{})
			requireRefused(t, ask("/sfu/get", sfuGet), http.StatusForbidden, "M_FORBIDDEN")
			requireRefused(t, alice.do(t, http.MethodPost, getTokenPaths[0], body(roomID)), http.StatusForbidden, "M_FORBIDDEN")

			s.Kill()
			log := everythingIn(t, filepath.Join(s.Dir, "log")) + everythingIn(t, filepath.Join(s.Dir, "output"))
			for _, secret := range []string{fakelivekit.Secret, openID["access_token"].(string), res.Get("jwt").Str} {
				require.NotContains(t, log, secret)
			}
		})
	}
}

// The service is for pages of any site. LiveKit's webhooks are always answered with 200, forged ones too. There is no path for leave events as
// long as nobody takes them over: any answer but 404 would be a promise.
func TestServiceRoutes(t *testing.T) {
	t.Parallel()
	const sfu = "ws://127.0.0.1:1/sfu"
	s := start(t, homeserver.Config{WellKnown: true, MatrixRTC: JSON{"livekit": startLiveKit(t).Section(sfu)}})
	anybody := &user{s.Anonymous(), s}
	for _, path := range []string{"/sfu/get", "/get_token", "/delegate_delayed_leave", "/sfu_webhook", "/healthz"} {
		preflight, err := anybody.Do(t.Context(), http.MethodOptions, servicePath+path, nil, "Access-Control-Request-Method", http.MethodPost)
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, preflight.Code)
		require.Equal(t, "*", preflight.Header.Get("Access-Control-Allow-Origin"))
		require.Contains(t, preflight.Header.Get("Access-Control-Allow-Headers"), "Content-Type")
		require.Contains(t, preflight.Header.Get("Access-Control-Allow-Methods"), http.MethodPost)
		requireRefused(t, anybody.do(t, http.MethodPut, servicePath+path, nil), http.StatusMethodNotAllowed, "M_UNRECOGNIZED")
	}
	for _, method := range []string{http.MethodGet, http.MethodHead} {
		require.Equal(t, http.StatusOK, anybody.do(t, method, servicePath+"/healthz", nil).Code)
	}
	code, err := fakelivekit.Report(t.Context(), s.URL+servicePath+"/sfu_webhook", JSON{"event": "room_finished", "room": JSON{"name": "x"}})
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, code)
	require.Equal(t, http.StatusOK, anybody.do(t, http.MethodPost, servicePath+"/sfu_webhook", JSON{"event": "room_finished"}).Code)
	requireUnrecognized(t, anybody, servicePath+"/delegate_expiration")
}
