//go:build all

package integration

import (
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/fakelivekit"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// Two servers, each with a LiveKit, give each other's users tokens with which they can listen. The clients ask their own server for that.
func TestTokensBetweenServers(t *testing.T) {
	t.Parallel()
	const nearSFU, farSFU = "ws://127.0.0.1:1/near", "ws://127.0.0.1:1/far"
	for i, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			authority, err := homeserver.NewAuthority(t.TempDir())
			require.NoError(t, err)
			liveKit := startLiveKit(t)
			at := func(host, sfu string, liveKit *fakelivekit.Server, db database) *server {
				return start(t, homeserver.Config{
					Postgres: db.open(t), WellKnown: true, Expiration: unlimited, MatrixRTC: JSON{"livekit": liveKit.Section(sfu)},
					Federation: &homeserver.Federation{Host: host, Authority: authority},
				})
			}
			near, far := at("127.0.0.2", nearSFU, liveKit, db), at("127.0.0.3", farSFU, startLiveKit(t), databases[(i+1)%len(databases)])
			alice, carol := near.newUser(t), far.newUser(t)
			p := &pair{near: near, far: far, alice: alice, carol: carol}
			roomID := p.newRoom(t, alice, carol)
			carol.arrived(t, roomID, alice) // near knows that carol has joined

			body := JSON{"url": nearSFU, "room_id": roomID, "slot_id": slotID, "member_id": "abc", "server_name": near.Name}
			with := func(key string, value any) JSON {
				changed := JSON{}
				for k, v := range body {
					changed[k] = v
				}
				changed[key] = value
				return changed
			}
			ask := func(who *user, body JSON) homeserver.Response {
				return who.do(t, http.MethodPost, getTokenPaths[0], body)
			}
			identity := livekit.Identity(carol.UserID, "abc")
			requireToken(t, ask(carol, body), roomID, identity, false)
			require.Equal(t, []string{livekit.RoomName(roomID, slotID)}, liveKit.Rooms(), "near's LiveKit has the room")
			requireRefused(t, ask(carol, with("url", "ws://127.0.0.1:1/other")), http.StatusBadRequest, "M_INVALID_PARAM")
			requireRefused(t, ask(carol, with("server_name", "127.0.0.9:1")), http.StatusForbidden, "M_FORBIDDEN")

			// Without a server name, the server is that of a member who publishes there.
			nameless := with("server_name", nil)
			requireRefused(t, ask(carol, nameless), http.StatusBadRequest, "M_INVALID_PARAM")
			alice.must(t, http.MethodPut, homeserver.StatePath(roomID, memberType, alice.UserID), JSON{
				"foci_preferred": []JSON{{"type": "livekit", "livekit_service_url": near.URL + servicePath, "url": nearSFU}},
			})
			alice.arrived(t, roomID, carol)
			requireToken(t, ask(carol, nameless), roomID, identity, false)

			// The service of near asks far who carol is.
			sfuGet := JSON{"room": roomID, "openid_token": carol.openID(t), "device_id": "DEV"}
			browser := &user{near.Anonymous(), near}
			requireToken(t, browser.do(t, http.MethodPost, servicePath+"/sfu/get", sfuGet), roomID, carol.UserID+":DEV", false)
			liveKit.Forget()
			requireRefused(t, browser.do(t, http.MethodPost, servicePath+"/sfu/get", sfuGet), http.StatusForbidden, "M_FORBIDDEN")
			forged := JSON{"access_token": "wrong", "matrix_server_name": far.Name}
			res := browser.do(t, http.MethodPost, servicePath+"/sfu/get", JSON{"room": roomID, "openid_token": forged, "device_id": "DEV"})
			requireRefused(t, res, http.StatusUnauthorized, "M_UNAUTHORIZED")

			// Whom near has not in the room gets no token, although far thinks otherwise.
			alice.must(t, http.MethodPost, "/_matrix/client/v3/rooms/"+roomID+"/ban", JSON{"user_id": carol.UserID})
			require.Equal(t, http.StatusForbidden, ask(carol, body).Code)

			other := p.newRoom(t, alice, carol)
			carol.arrived(t, other, alice)
			require.NoError(t, near.Stop())
			requireRefused(t, ask(carol, with("room_id", other)), http.StatusBadGateway, "M_UNKNOWN")
		})
	}
}

// A hostile server gets tokens for its own users who are joined, and for nobody else. A server that does not answer costs ten seconds.
func TestTokensForAHostileServer(t *testing.T) {
	t.Parallel()
	const sfu = "ws://127.0.0.1:1/sfu"
	authority, err := homeserver.NewAuthority(t.TempDir())
	require.NoError(t, err)
	s := start(t, homeserver.Config{
		WellKnown: true, MatrixRTC: JSON{"livekit": startLiveKit(t).Section(sfu)},
		Federation: &homeserver.Federation{Host: "127.0.0.2", Authority: authority},
	})
	peer, err := homeserver.NewPeer("127.0.0.4", t.TempDir(), authority)
	require.NoError(t, err)
	t.Cleanup(func() { _ = peer.Close() })
	alice := s.newUser(t)
	roomID := s.room(t, alice)
	ask := func(userID string) homeserver.Response {
		t.Helper()
		var last homeserver.Response
		for _, path := range []string{"/_matrix/federation/v1", "/_matrix/federation/unstable/io.element.msc4195"} {
			res, err := peer.Post(t.Context(), s.Name, path+"/rtc/livekit/get_token",
				JSON{"url": sfu, "room_id": roomID, "slot_id": slotID, "member_id": "abc", "user_id": userID})
			require.NoError(t, err)
			require.True(t, last.Code == 0 || last.Code == res.Code)
			last = res
		}
		return last
	}
	requireRefused(t, ask(peer.UserID), http.StatusForbidden, "M_FORBIDDEN")
	_, err = peer.Join(t.Context(), s.Name, roomID)
	require.NoError(t, err)
	requireToken(t, ask(peer.UserID), roomID, livekit.Identity(peer.UserID, "abc"), false)
	requireRefused(t, ask(alice.UserID), http.StatusForbidden, "M_FORBIDDEN")

	began := time.Now()
	res := alice.do(t, http.MethodPost, getTokenPaths[0], JSON{
		"url": "wss://peer.example", "room_id": roomID, "slot_id": slotID, "member_id": "abc", "server_name": string(peer.Name),
	})
	requireRefused(t, res, http.StatusBadGateway, "M_UNKNOWN")
	require.GreaterOrEqual(t, time.Since(began), 9*time.Second)
	require.Positive(t, peer.Asked())
}
