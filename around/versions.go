package around

import (
	"encoding/json"
	"net/http"

	"github.com/gorilla/mux"
	"github.com/matrix-org/dendrite/internal/httputil"
	"github.com/matrix-org/util"
)

// Versions returns a middleware for the router of the client API. It adds unstable features to Dendrite's answer of /versions.
func Versions(features ...string) mux.MiddlewareFunc {
	return Get(Path(httputil.PublicClientPathPrefix+"versions"), func(dendrite http.Handler) http.Handler {
		return httputil.MakeExternalAPI("versions", func(req *http.Request) util.JSONResponse {
			answer, body, ok := Answer(dendrite, req)
			if !ok {
				return answer
			}
			versions, err := advertise(body, features)
			if err != nil {
				return util.ErrorResponse(err)
			}
			return util.JSONResponse{Code: http.StatusOK, JSON: versions}
		})
	})
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
