// Package rtc tells clients over what the media of their calls can go (MatrixRTC transports, MSC4143).
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

// Transport is something over which the media of calls go (MSC4143).
type Transport struct {
	// Type is what it is: "livekit" (MSC4195).
	Type string `yaml:"type" json:"type"`
	// LiveKitServiceURL is where clients get tokens for LiveKit's SFU.
	LiveKitServiceURL string `yaml:"livekit_service_url" json:"livekit_service_url"`
}

// wellKnownTransports is where clients look that do not know the endpoint.
const wellKnownTransports = "org.matrix.msc4143.rtc_foci"

// AddRoutes registers the routes that tell clients of the transports, the best first. It must be called before Dendrite
// registers its own.
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
		addWellKnownTransports(routers.WellKnown, transports)
	}
}

// addWellKnownTransports adds the transports to what Dendrite says about itself, if it is configured to say anything.
func addWellKnownTransports(router *mux.Router, transports []Transport) {
	router.Handle("/client", httputil.MakeExternalAPI("wellknown", func(req *http.Request) util.JSONResponse {
		answer, body, ok := around.Dendrite(router, req)
		if !ok {
			return answer
		}
		var client map[string]json.RawMessage
		err := json.Unmarshal(body, &client)
		if err == nil {
			client[wellKnownTransports], err = json.Marshal(transports)
		}
		if err != nil {
			return util.ErrorResponse(err)
		}
		return util.JSONResponse{Code: http.StatusOK, JSON: client}
	})).Methods(http.MethodGet).MatcherFunc(around.First)
}
