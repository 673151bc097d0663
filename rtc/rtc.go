// Package rtc tells clients which transports their calls can use (MatrixRTC, MSC4143).
package rtc

import (
	"encoding/json"
	"net/http"

	"github.com/gorilla/mux"
	"github.com/matrix-org/dendrite/internal/httputil"
	userapi "github.com/matrix-org/dendrite/userapi/api"
	"github.com/matrix-org/util"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/around"
)

// Transport carries the media of calls.
type Transport struct {
	// Type is "livekit" (MSC4195).
	Type string `yaml:"type" json:"type"`
	// LiveKitServiceURL is the service that gives clients tokens for LiveKit's SFU.
	LiveKitServiceURL string `yaml:"livekit_service_url" json:"livekit_service_url"`
}

// wellKnownTransports is the key in /.well-known/matrix/client, for clients that do not know the endpoint of AddRoutes.
const wellKnownTransports = "org.matrix.msc4143.rtc_foci"

// AddRoutes registers the routes that announce the transports. The best transport comes first in the list. AddRoutes must be called before
// Dendrite registers its own routes.
func AddRoutes(routers httputil.Routers, userAPI userapi.QueryAcccessTokenAPI, transports []Transport) {
	if transports == nil {
		transports = []Transport{}
	}
	routers.Client.Handle("/unstable/org.matrix.msc4143/rtc/transports", httputil.MakeAuthAPI("rtc_transports", userAPI,
		func(*http.Request, *userapi.Device) util.JSONResponse {
			return util.JSONResponse{Code: http.StatusOK, JSON: struct {
				Transports []Transport `json:"rtc_transports"`
			}{transports}}
		}, httputil.WithAllowGuests(),
	)).Methods(http.MethodGet, http.MethodOptions)
	if len(transports) > 0 {
		routers.WellKnown.Use(wellKnown(transports))
	}
}

// wellKnown returns a middleware that adds the transports to Dendrite's /.well-known/matrix/client, if Dendrite is configured to serve it.
func wellKnown(transports []Transport) mux.MiddlewareFunc {
	return around.Object(httputil.PublicWellKnownPrefix+"client", "wellknown", func(client map[string]json.RawMessage) (err error) {
		client[wellKnownTransports], err = json.Marshal(transports)
		return err
	})
}
