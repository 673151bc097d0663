package around

import (
	"encoding/json"

	"github.com/gorilla/mux"
	"github.com/matrix-org/dendrite/internal/httputil"
)

// Versions returns a middleware for the router of the client API. It adds unstable features to Dendrite's answer of /versions.
func Versions(features ...string) mux.MiddlewareFunc {
	return Object(httputil.PublicClientPathPrefix+"versions", "versions", func(versions map[string]json.RawMessage) (err error) {
		all := map[string]bool{}
		if data := versions["unstable_features"]; data != nil {
			if err = json.Unmarshal(data, &all); err != nil {
				return err
			}
		}
		for _, feature := range features {
			all[feature] = true
		}
		versions["unstable_features"], err = json.Marshal(all)
		return err
	})
}
