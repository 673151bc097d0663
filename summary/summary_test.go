package summary

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/setup/config"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/matrix-org/gomatrixserverlib/spec"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/limits"
)

const (
	private = "!private:localhost"
	unknown = "!unknown:localhost"
)

// fakeRoomserver has one private room. It records the queries, and answers those about its room more slowly.
type fakeRoomserver struct {
	RoomserverAPI
	asked []string
	slow  time.Duration
}

func (r *fakeRoomserver) ask(what, roomID string) bool {
	r.asked = append(r.asked, what)
	if roomID == private {
		time.Sleep(r.slow)
	}
	return roomID == private
}

func (r *fakeRoomserver) QueryServerJoinedToRoom(_ context.Context, req *api.QueryServerJoinedToRoomRequest, res *api.QueryServerJoinedToRoomResponse) error {
	res.IsInRoom = r.ask("server", req.RoomID)
	res.RoomVersion = gomatrixserverlib.RoomVersionV10
	return nil
}

func (r *fakeRoomserver) QueryBulkStateContent(_ context.Context, req *api.QueryBulkStateContentRequest, res *api.QueryBulkStateContentResponse) error {
	if r.ask("state", req.RoomIDs[0]) {
		res.Rooms = map[string]map[gomatrixserverlib.StateKeyTuple]string{private: {{EventType: spec.MRoomJoinRules}: spec.Invite}}
	}
	return nil
}

func (r *fakeRoomserver) QuerySenderIDForUser(_ context.Context, roomID spec.RoomID, userID spec.UserID) (*spec.SenderID, error) {
	r.ask("sender", roomID.String())
	sender := spec.SenderID(userID.String())
	return &sender, nil
}

func (r *fakeRoomserver) QueryRoomsForUser(_ context.Context, _ spec.UserID, membership string) ([]spec.RoomID, error) {
	r.ask(membership, "")
	return nil, nil
}

// logins is a fake user API, in which each access token is the localpart of its user.
type logins struct{}

func (logins) QueryAccessToken(_ context.Context, req *userapi.QueryAccessTokenRequest, res *userapi.QueryAccessTokenResponse) error {
	res.Device = &userapi.Device{UserID: "@" + req.AccessToken + ":localhost", AccountType: userapi.AccountTypeUser}
	return nil
}

func newRoutes(rsAPI RoomserverAPI, limit limits.Rate) http.Handler {
	routers := httputil.NewRouters()
	dendrite := &config.ClientAPI{Matrix: &config.Global{}}
	dendrite.Matrix.ServerName = "localhost"
	New(Config{Limit: limit, RealIPHeader: "X-Real-IP"}, dendrite, rsAPI).AddRoutes(routers.Client, logins{})
	return routers.Client
}

func get(routes http.Handler, roomID, token string, header ...string) *httptest.ResponseRecorder {
	req := httptest.NewRequest(http.MethodGet, "/_matrix/client/v1/room_summary/"+roomID, nil)
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res := httptest.NewRecorder()
	routes.ServeHTTP(res, req)
	return res
}

// A private room is answered as a room that does not exist: after the same queries, after the same time, and with the same text. This holds
// although the roomserver takes longer for the private room.
func TestPrivateIsLikeUnknown(t *testing.T) {
	for _, token := range []string{"", "alice"} {
		synctest.Test(t, func(t *testing.T) {
			rsAPI := &fakeRoomserver{slow: 7 * time.Millisecond}
			routes := newRoutes(rsAPI, limits.Rate{})
			look := func(roomID string) (asked []string, took time.Duration, body string) {
				rsAPI.asked = nil
				start := time.Now()
				res := get(routes, roomID, token)
				require.Equal(t, http.StatusNotFound, res.Code)
				return rsAPI.asked, time.Since(start), res.Body.String()
			}
			asked, took, body := look(unknown)
			require.NotEmpty(t, asked)
			askedPrivate, tookPrivate, bodyPrivate := look(private)
			require.Equal(t, asked, askedPrivate)
			require.Equal(t, took, tookPrivate)
			require.Equal(t, body, bodyPrivate)
		})
	}
}

// A client does not escape its limit with new connections, or with a header that the proxy does not set. A user has one limit, whatever the
// address is.
func TestLimits(t *testing.T) {
	routes := newRoutes(&fakeRoomserver{}, limits.Rate{Threshold: 1, Cooloff: time.Hour})
	require.Equal(t, http.StatusNotFound, get(routes, unknown, "").Code)
	res := get(routes, unknown, "", "X-Forwarded-For", "203.0.113.7")
	require.Equal(t, http.StatusTooManyRequests, res.Code)
	require.NotEmpty(t, res.Header().Get("Retry-After"))
	require.Contains(t, res.Body.String(), "M_LIMIT_EXCEEDED")
	require.Equal(t, http.StatusNotFound, get(routes, unknown, "", "X-Real-IP", "203.0.113.8").Code, "another client behind the proxy")
	require.Equal(t, http.StatusNotFound, get(routes, unknown, "alice").Code)
	require.Equal(t, http.StatusTooManyRequests, get(routes, unknown, "alice", "X-Real-IP", "203.0.113.9").Code)
	require.Equal(t, http.StatusNotFound, get(routes, unknown, "bob").Code)
}
