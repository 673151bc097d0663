package rtc

import (
	"context"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/internal/httputil"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/limits"
)

const (
	unstableTransports = "/_matrix/client/unstable/org.matrix.msc4143/rtc/transports"
	stableTransports   = "/_matrix/client/v1/rtc/transports"
	wellKnownClient    = "/.well-known/matrix/client"
)

// accounts knows users by tokens that are their user IDs.
type accounts map[string]userapi.AccountType

func (a accounts) QueryAccessToken(_ context.Context, req *userapi.QueryAccessTokenRequest, res *userapi.QueryAccessTokenResponse) error {
	if accountType, ok := a[req.AccessToken]; ok {
		res.Device = &userapi.Device{UserID: req.AccessToken, AccountType: accountType}
	}
	return nil
}

// serve returns a server with the routes of a Discovery, and Dendrite's well-known file.
func serve(t *testing.T, d *Discovery, users accounts) (ask func(method, path, user string) *httptest.ResponseRecorder) {
	routers := httputil.NewRouters()
	d.AddRoutes(routers, users)
	routers.WellKnown.HandleFunc("/client", func(w http.ResponseWriter, _ *http.Request) {
		_, err := w.Write([]byte(`{"m.homeserver":{"base_url":"https://a.example"}}`))
		require.NoError(t, err)
	})
	return func(method, path, user string) *httptest.ResponseRecorder {
		req, w := httptest.NewRequest(method, path, nil), httptest.NewRecorder()
		if user != "" {
			req.Header.Set("Authorization", "Bearer "+user)
		}
		if path == wellKnownClient {
			routers.WellKnown.ServeHTTP(w, req)
		} else {
			routers.Client.ServeHTTP(w, req)
		}
		return w
	}
}

var two = []Transport{
	{Type: TypeLiveKit, LiveKitServiceURL: "https://a.example/jwt", URL: "wss://a.example/sfu"},
	{Type: TypeLiveKit, LiveKitServiceURL: "https://b.example"},
}

// One list is told at every place. The url is in it only together with sticky events; the stable path has both names of the type, and both
// keys.
func TestOneList(t *testing.T) {
	for name, test := range map[string]struct {
		features []string
		url      string
	}{
		"WithoutStickyEvents": {[]string{"org.matrix.msc4140"}, ""},
		"WithStickyEvents":    {[]string{"org.matrix.msc4140", "org.matrix.msc4354"}, `,"url":"wss://a.example/sfu"`},
	} {
		t.Run(name, func(t *testing.T) {
			d := NewDiscovery(Config{Transports: two}, test.features)
			ask := serve(t, d, accounts{"@alice:localhost": userapi.AccountTypeUser})
			a := `"livekit_service_url":"https://a.example/jwt"` + test.url + "}"
			b := `"livekit_service_url":"https://b.example"}`
			list := `[{"type":"livekit",` + a + `,{"type":"livekit",` + b + "]"
			both := `[{"type":"livekit",` + a + `,{"type":"m.livekit",` + a + `,{"type":"livekit",` + b + `,{"type":"m.livekit",` + b + "]"

			require.JSONEq(t, `{"rtc_transports":`+list+"}", ask("GET", unstableTransports, "@alice:localhost").Body.String())
			require.JSONEq(t, `{"rtc_transports":`+both+`,"transports":`+both+"}", ask("GET", stableTransports, "@alice:localhost").Body.String())
			client := gjson.Parse(ask("GET", wellKnownClient, "").Body.String())
			require.JSONEq(t, list, client.Get(`org\.matrix\.msc4143\.rtc_foci`).Raw)
			require.Equal(t, "https://a.example", client.Get(`m\.homeserver.base_url`).Str)
			require.Equal(t, []string{"org.matrix.msc4143"}, d.Features())
		})
	}
	require.NotEmpty(t, two[0].URL, "the caller's list is not changed")
}

// Without transports the answers are those of a server that knows nothing of calls.
func TestNothingConfigured(t *testing.T) {
	d := NewDiscovery(Config{}, []string{"org.matrix.msc4354"})
	ask := serve(t, d, accounts{"@alice:localhost": userapi.AccountTypeUser})
	for _, path := range []string{unstableTransports, stableTransports} {
		for _, method := range []string{"GET", "POST", "OPTIONS"} {
			w := ask(method, path, "@alice:localhost")
			require.Equal(t, http.StatusNotFound, w.Code, path)
			require.Equal(t, "M_UNRECOGNIZED", gjson.Get(w.Body.String(), "errcode").Str)
			require.Equal(t, "*", w.Header().Get("Access-Control-Allow-Origin"))
		}
	}
	require.JSONEq(t, `{"m.homeserver":{"base_url":"https://a.example"}}`, ask("GET", wellKnownClient, "").Body.String())
	require.Empty(t, d.Features())
}

// The transports are told to users and guests, not to others, and each user may ask only so often.
func TestWhoMayAsk(t *testing.T) {
	d := NewDiscovery(Config{Transports: two, UserRequests: limits.Rate{Threshold: 2, Cooloff: time.Hour}}, nil)
	ask := serve(t, d, accounts{
		"@alice:localhost": userapi.AccountTypeUser, "@guest:localhost": userapi.AccountTypeGuest, "@bridge:localhost": userapi.AccountTypeAppService,
	})
	for _, user := range []string{"@alice:localhost", "@guest:localhost", "@bridge:localhost"} {
		require.Equal(t, http.StatusOK, ask("GET", unstableTransports, user).Code, user)
		require.Equal(t, http.StatusOK, ask("GET", stableTransports, user).Code, user)
		w := ask("GET", unstableTransports, user)
		if user == "@bridge:localhost" {
			require.Equal(t, http.StatusOK, w.Code)
			continue
		}
		require.Equal(t, http.StatusTooManyRequests, w.Code, user)
		require.Equal(t, "M_LIMIT_EXCEEDED", gjson.Get(w.Body.String(), "errcode").Str)
		require.NotEmpty(t, w.Header().Get("Retry-After"))
	}
	require.Equal(t, http.StatusUnauthorized, ask("GET", unstableTransports, "").Code)
	require.Equal(t, http.StatusUnauthorized, ask("GET", stableTransports, "nobody").Code)
	require.Equal(t, http.StatusMethodNotAllowed, ask("POST", stableTransports, "@alice:localhost").Code)
}
