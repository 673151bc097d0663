package clientapi

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/clientapi/routing"
	"github.com/matrix-org/dendrite/roomserver/api"
	"github.com/matrix-org/dendrite/setup/config"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/gomatrixserverlib"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"
)

// dendrite is a fake of the APIs that the handler uses. It has one user and a default room version.
type dendrite struct{ api.ClientRoomserverAPI }

func (dendrite) DefaultRoomVersion() gomatrixserverlib.RoomVersion {
	return gomatrixserverlib.RoomVersionV10
}

func (dendrite) QueryAccessToken(_ context.Context, req *userapi.QueryAccessTokenRequest, res *userapi.QueryAccessTokenResponse) error {
	switch req.AccessToken {
	case "token":
		res.Device = &userapi.Device{UserID: "@alice:localhost"}
	case "service":
		userID := cmp.Or(req.AppServiceUserID, "@alice:localhost")
		if userID == "@foreign:localhost" {
			res.Err = "forbidden: appservice has not registered this user" // as Dendrite words it
			return nil
		}
		res.Device = &userapi.Device{UserID: userID, AccountType: userapi.AccountTypeAppService}
	case "away":
		return errors.New("the database is away")
	}
	return nil
}

func TestCapabilities(t *testing.T) {
	limits := &config.RateLimiting{Enabled: true, Threshold: 1, CooloffMS: time.Hour.Milliseconds()}
	handler := capabilitiesHandler(dendrite{}, dendrite{}, limits, Config{MaxDelay: 90 * time.Second})
	get := func(token string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/?access_token="+token, nil))
		return w
	}
	require.Equal(t, http.StatusUnauthorized, get("forged").Code)

	w := get("token")
	require.Equal(t, http.StatusOK, w.Code)
	require.Equal(t, "application/json", w.Header().Get("Content-Type"))
	stock, err := json.Marshal(routing.GetCapabilities(dendrite{}).JSON)
	require.NoError(t, err)
	var want map[string]map[string]any
	require.NoError(t, json.Unmarshal(stock, &want))
	for _, name := range []string{"m.delayed_events", "org.matrix.msc4140.delayed_events"} {
		want["capabilities"][name] = map[string]int{"max_delay_ms": 90_000, "max_scheduled": 0}
	}
	wanted, err := json.Marshal(want)
	require.NoError(t, err)
	require.JSONEq(t, string(wanted), w.Body.String())

	require.Equal(t, http.StatusTooManyRequests, get("token").Code, "limited as Dendrite's own")
}

// An application service's users are shown their own limit, and none if delayed events are switched off.
func TestCapabilitiesOfAService(t *testing.T) {
	for maxScheduled, want := range map[int]int64{0: 0, 100: 500} {
		handler := capabilitiesHandler(dendrite{}, dendrite{}, &config.RateLimiting{}, Config{MaxScheduled: maxScheduled, MaxScheduledOfService: 500})
		w := doWith(handler, http.MethodGet, "/", "", "service")
		require.Equal(t, want, gjson.Get(w.Body.String(), `capabilities.m\.delayed_events.max_scheduled`).Int())
	}
}
