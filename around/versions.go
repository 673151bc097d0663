package around

import (
	"encoding/json"
	"net/http"

	"github.com/gorilla/mux"
	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/util"
)

// AddVersions registers a route that adds unstable features to Dendrite's answer to /versions. It must be called before Dendrite registers
// its own route.
func AddVersions(router *mux.Router, features ...string) {
	router.Handle("/versions", httputil.MakeExternalAPI("versions", func(req *http.Request) util.JSONResponse {
		answer, body, ok := Dendrite(router, req)
		if !ok {
			return answer
		}
		versions, err := advertise(body, features)
		if err != nil {
			return util.ErrorResponse(err)
		}
		return util.JSONResponse{Code: http.StatusOK, JSON: versions}
	})).Methods(http.MethodGet).MatcherFunc(First)
}

// advertise adds features to an answer to /versions.
func advertise(answer []byte, features []string) (map[string]json.RawMessage, error) {
	var versions map[string]json.RawMessage
	if err := json.Unmarshal(answer, &versions); err != nil {
		return nil, err
	}
	all := map[string]bool{}
	if data := versions["unstable_features"]; data != nil {
		if err := json.Unmarshal(data, &all); err != nil {
			return nil, err
		}
	}
	for _, feature := range features {
		all[feature] = true
	}
	data, err := json.Marshal(all)
	versions["unstable_features"] = data
	return versions, err
}
